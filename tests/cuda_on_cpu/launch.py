"""Launch an emulated kernel like a `cupy.RawKernel`: kernel(grid, block, args, shared_mem=...)."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from typing import Any

import numpy as np

from tests.cuda_on_cpu.guard import Extent, moved, regions
from tests.cuda_on_cpu.sanitize import forget_fibers, reports, tsan_fibers

ORDERS = {"fifo": 0, "lifo": 1, "random": 2}
SECONDS = 120  # of processor time, after which a kernel is stopped


class KernelError(RuntimeError):
    """A kernel did not compile, or did what no GPU forgives."""


class _Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


class _Config(ctypes.Structure):
    """state.h has the same."""

    _fields_ = [
        ("grid", _Dim3), ("block", _Dim3), ("shared", ctypes.c_size_t), ("resident", ctypes.c_int),
        ("order", ctypes.c_int), ("strict", ctypes.c_int), ("seconds", ctypes.c_int),
        ("seed", ctypes.c_uint64), ("args", ctypes.POINTER(ctypes.c_void_p)),
        ("tsan_fibers", ctypes.POINTER(ctypes.c_void_p)),
    ]  # fmt: skip


class EmulatedKernel:
    """One kernel of a compiled file. `signature` has a word a parameter: p (to const) or P for
    pointers, then i, u, f, b (bf16) or v (other) and the size in bytes."""

    def __init__(self, library: ctypes.PyDLL, name: str) -> None:
        """Find the kernel. Raises AttributeError where there is none of this name."""
        self.name, self._path = name, library._name
        self._launch = getattr(library, f"emu_launch_{name}")
        self._launch.restype = ctypes.c_char_p
        words = ctypes.create_string_buffer(4096)
        getattr(library, f"emu_signature_{name}")(words)
        self.signature = words.value.decode().split()

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *,
        shared_mem: int = 0, order: str = "fifo", seed: int = 0, resident: bool = False,
        guard: str = "after", strict: int = 2, seconds: int = SECONDS,
    ) -> None:  # fmt: skip
        """Run every thread of every block.

        order: of threads and blocks, fifo, lifo or random; resident: all blocks side by side, else
        one after the other; guard: as of guard.regions; strict: 1 if a barrier is one line, 2 if
        moreover no thread leaves before the others' last barrier, 0 if neither.
        Raises KernelError for what went wrong on the "device", TypeError for wrong arguments.
        """
        if len(args) != len(self.signature):
            raise TypeError(f"{self.name}: got {len(args)} arguments, wanted {len(self.signature)}")
        extents = {
            i: self._extent(i, args[i], word)
            for i, word in enumerate(self.signature)
            if word[0] in "pP"
        }
        scalars = {
            i: self._scalar(i, args[i], np.dtype(word))
            for i, word in enumerate(self.signature)
            if i not in extents
        }
        copies = regions(extents.values(), guard)
        values = scalars | {i: ctypes.c_void_p(moved(e, copies)) for i, e in extents.items()}
        slots = (ctypes.c_void_p * max(1, len(args)))(
            *(ctypes.addressof(values[i]) for i in range(len(args)))
        )
        config = _Config(
            _dim3(grid), _dim3(block), shared_mem, int(resident), ORDERS[order], strict, seconds,
            seed, slots, tsan_fibers(math.prod(block) * (math.prod(grid) if resident else 1)),
        )  # fmt: skip
        reports()  # what is left of launches before this one
        error = (self._launch(ctypes.byref(config)) or b"").decode(errors="replace")
        error = "\n".join(filter(None, (error, reports())))
        intact = all(copy.intact() for copy in copies)
        for copy in copies:
            copy.close()
        if error:
            forget_fibers()  # they may have stopped anywhere
            raise KernelError(f"{self.name}: {_with_source_line(error, self._path)}")
        if not intact:
            raise KernelError(f"{self.name}: wrote outside an array")

    def _extent(self, index: int, array: Any, word: str) -> Extent:
        """Where an array argument lies; an empty extent for a null pointer."""
        if array is None or (isinstance(array, np.uintp) and array == 0):
            return Extent(0, 0, False)
        if not isinstance(array, np.ndarray):
            raise self._wrong(index, type(array).__name__, "an array")
        wanted = "bfloat16" if word[1] == "b" else np.dtype(word[1:]).name if word[1] != "v" else ""
        if wanted and array.dtype.name != wanted:
            raise self._wrong(index, array.dtype, wanted)
        written = word[0] == "P"
        if written and not array.flags.writeable:
            raise self._wrong(index, "a read-only array", "one the kernel may write")
        low, high = np.lib.array_utils.byte_bounds(array) if array.size else (0, 0)
        return Extent(low, high, written)

    def _scalar(self, index: int, value: Any, wanted: np.dtype) -> Any:
        """Its bytes. CuPy takes a Python int for int64 and a float for float64: so does this."""
        got = np.asarray(value)
        if got.dtype != wanted or got.ndim:
            raise self._wrong(index, f"{got.dtype} {got.shape or ''}".strip(), wanted)
        return (ctypes.c_char * got.nbytes).from_buffer_copy(got.tobytes())

    def _wrong(self, index: int, got: Any, wanted: Any) -> TypeError:
        return TypeError(f"{self.name}: argument {index}: got {got}, wanted {wanted}")


def _dim3(sizes: tuple[int, ...]) -> _Dim3:
    return _Dim3(*(max(1, size) for size in (*sizes, 1, 1)[:3]))  # CuPy makes 0 blocks 1


def _with_source_line(message: str, library: str) -> str:
    """Name the lines of the kernel that a program counter in the message belongs to."""
    match = re.search(r" \[pc (0x[0-9a-f]+|0)\]", message)
    if not match:
        return message
    command = ["addr2line", "-i", "-s", "-e", library, match[1]]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        said = ""
    where = dict.fromkeys(re.findall(r"\w+\.cuh?:\d+", said))
    return message.replace(match[0], f" [{', '.join(where)}]" if where else "")
