"""Arrays of the stand-in GPU: what CuPy's can do without touching numbers, and nothing else.

They are no NumPy arrays: NumPy takes a copy of its own kind, subclasses too, without asking it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

ALIGN = 256  # bytes: where a GPU's allocator places arrays
POISON = 0xFF  # what nobody wrote, or what was freed, reads as NaN and as -1


class Memory:
    """One allocation; freed when no array refers to it any more."""

    def __init__(self, nbytes: int) -> None:
        """Bytes at a multiple of ALIGN, which read as NaN."""
        raw = np.empty(nbytes + ALIGN, np.uint8)
        start = -raw.ctypes.data % ALIGN
        self.bytes = raw[start : start + nbytes]
        self.bytes.fill(POISON)
        self.address, self.nbytes = int(self.bytes.ctypes.data), nbytes


class Heap:
    """What is allocated."""

    def __init__(self, total: int) -> None:
        """`total` bytes in all."""
        self.total, self.used, self.peak = total, 0, 0
        self._live: weakref.WeakSet[Memory] = weakref.WeakSet()

    def allocate(self, nbytes: int) -> Memory | None:
        """`nbytes`, rounded up to ALIGN; None where so many are not free."""
        rounded = -(-nbytes // ALIGN) * ALIGN
        if rounded > self.total - self.used:
            return None
        self.used += rounded
        self.peak = max(self.peak, self.used)
        memory = Memory(nbytes)
        weakref.finalize(memory, self._free, rounded, memory.bytes).atexit = False
        self._live.add(memory)
        return memory

    def find(self, address: int, nbytes: int) -> Memory:
        """The allocation in which so many bytes lie. Raises AssertionError where there is none."""
        for memory in self._live:
            if memory.address <= address <= address + nbytes <= memory.address + memory.nbytes:
                return memory
        raise AssertionError(f"{nbytes:,} bytes at {address:#x} are in no array, or it was freed")

    def _free(self, rounded: int, freed: np.ndarray) -> None:
        self.used -= rounded
        freed.fill(POISON)


@dataclass(frozen=True)
class Flags:
    """Those of CuPy's that launchers ask for."""

    c_contiguous: bool


@dataclass(frozen=True)
class Pointer:
    """As `cupy.cuda.MemoryPointer`."""

    ptr: int


class GuardedArray:
    """An array on the device: shapes and views of it are free, its numbers out of reach."""

    __slots__ = ("__weakref__", "_array", "_memory")
    __hash__ = None

    def __init__(self, memory: Memory, array: np.ndarray) -> None:
        """`array` is a view of `memory`, which lives as long as this does."""
        self._memory, self._array = memory, array

    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    strides = property(lambda self: self._array.strides)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)
    itemsize = property(lambda self: self._array.itemsize)
    data = property(lambda self: Pointer(int(self._array.ctypes.data)))
    T = property(lambda self: GuardedArray(self._memory, self._array.T))

    @property
    def flags(self) -> Flags:
        return Flags(self._array.flags.c_contiguous)

    def reshape(self, *shape: Any) -> GuardedArray:
        """A view; CuPy would allocate and copy where there is none."""
        wanted = shape[0] if len(shape) == 1 else shape
        try:
            return GuardedArray(self._memory, self._array.reshape(wanted, copy=False))
        except ValueError as failure:
            raise AssertionError(f"{self}: reshape to {wanted}: {failure}") from None

    def view(self, dtype: Any) -> GuardedArray:
        """The same bytes."""
        return GuardedArray(self._memory, self._array.view(dtype))

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, key: Any) -> GuardedArray:
        """A view; of no dimension for one number, as CuPy has it."""
        keys = key if isinstance(key, tuple) else (key,)
        for k in keys:
            plain = k is None or k is Ellipsis or isinstance(k, slice | int | np.integer)
            if not plain or isinstance(k, bool):
                raise AssertionError(f"{self}: indexed by {k!r}, which gathers into new memory")
        dots = () if any(k is Ellipsis for k in keys) else (Ellipsis,)
        return GuardedArray(self._memory, self._array[(*keys, *dots)])

    def __iter__(self) -> Iterator[GuardedArray]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"device array {self._array.dtype} {self._array.shape}"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # somebody asks what this can do
            raise AttributeError(name)
        _refuse(self, f".{name}")


def _refuse(array: GuardedArray, what: str) -> NoReturn:
    raise AssertionError(
        f"{array!r}: {what}: only kernels, products and the Gpu's own copies touch its numbers"
    )


def _refused(name: str) -> Any:
    def method(self: GuardedArray, *args: Any, **kwargs: Any) -> NoReturn:
        called = getattr(args[0], "__name__", "") if args and name.startswith("__array_") else ""
        _refuse(self, called or name)

    return method


_OPERATORS = "add sub mul truediv floordiv mod divmod pow matmul lshift rshift and or xor"
_OTHERS = """
eq ne lt le gt ge neg pos abs invert setitem delitem reduce_ex bool int float complex index round
trunc floor ceil array array_ufunc
"""
_SIDES = [f"{side}{name}" for name in _OPERATORS.split() for side in ("", "r", "i")]
for _name in (*_SIDES, *_OTHERS.split()):
    setattr(GuardedArray, f"__{_name}__", _refused(f"__{_name}__"))


def raw(array: Any) -> np.ndarray:
    """Its numbers, for the stand-in alone. Raises AssertionError for a host's array."""
    if type(array) is not GuardedArray:
        raise AssertionError(f"got {type(array).__name__}, wanted an array of the device")
    return array._array


def flat_bytes(array: Any) -> np.ndarray:
    """The bytes of a contiguous one."""
    numbers = raw(array)
    assert numbers.flags.c_contiguous, f"{array}: strides {numbers.strides}, wanted contiguous"
    return numbers.reshape(-1).view(np.uint8)


def memory_of(array: GuardedArray) -> Memory:
    """What it lies in."""
    return array._memory


def peek(array: GuardedArray) -> np.ndarray:
    """A copy of its numbers, for a test to look at."""
    return np.array(raw(array))


def whole_rows(array: GuardedArray) -> np.ndarray:
    """The numbers a kernel is handed: with what lies between rows that are apart."""
    x, memory = array._array, array._memory
    if x.ndim != 2 or not x.size or x.strides[1] != x.itemsize or x.strides[0] <= x[0].nbytes:
        return x
    end = x.ctypes.data + len(x) * x.strides[0]
    if x.strides[0] % x.itemsize or end > memory.address + memory.nbytes:
        return x
    return np.lib.stride_tricks.as_strided(x, (len(x), x.strides[0] // x.itemsize))
