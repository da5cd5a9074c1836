"""NumPy on the CPU: one Python thread a batch shard, each with a single-threaded BLAS."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import cached_property, partial
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import ThreadpoolController

from ..arena import ALIGN
from ..dims import Dims
from ..errors import BackendError
from ..ops import Ops
from ..ops.reference import ReferenceOps, workspace_bytes
from ..types import Array
from .beside import Beside, usable_cores

if TYPE_CHECKING:
    from ..ops.cpu import CompiledOps

DTYPES = {"auto": np.float32, "fp32": np.float32, "fp64": np.float64, "bf16": np.float32}
PIN = "OPENBLAS_CORETYPE"  # makes OpenBLAS take one kind of core for another
INSTALL = "pip install 'gpu-microgpt[fast]'"
SHARD_FLOPS = 5e8  # of a step in plain NumPy: a smaller one loses more by sharing than it gains
SHARE_FLOPS = 1.5e7  # of each thread at least, where threads stay in compiled code for many steps
PIECE_ROWS = 1024  # worked on at a time: enough for BLAS, few enough for the cache
NARROW_ROWS = 256  # where products are so fast that they wait for the cache; unless a row takes
ROW_FLOPS = 2e7  # more than this: large weights, which are packed anew for every piece


class NumpyBackend:
    """The readable truth: plain NumPy, BLAS for the matrix products."""

    name = "numpy"
    is_host = True

    def __init__(
        self, dtype: str = "auto", threads: int = 0, why: str = "", kernels: str = "reference"
    ) -> None:
        """Take a dtype (auto, fp32, fp64, bf16), a number of threads (0 = every core), why it is
        this backend, for `describe`, and whose operations compute: reference, compiled, or auto,
        which is compiled where Numba is installed.

        Raises BackendError for the dtype only GPUs run, for compiled without Numba, and for bf16
        without compiled operations or on a CPU that has no such products.
        """
        if dtype not in DTYPES:
            raise BackendError(
                f"dtype: got {dtype}; backend numpy runs fp32, fp64 or bf16 (auto = fp32)"
            )
        self.dtype = self.master = np.dtype(DTYPES[dtype])
        self.threads = threads or usable_cores()
        self.compiled = _compiles(kernels)
        self._unit = _bf16_unit(kernels, self.compiled) if dtype == "bf16" else ""
        self._hint = "" if self.compiled or kernels == "reference" else f"; {INSTALL} compiles them"
        self._why = f" ({why})" if why else ""
        self._controller = ThreadpoolController()
        self._blas_threads = 1
        self._stack: list[ExitStack] = []
        self._beside: list[Beside] = []

    def describe(self) -> str:
        """One line: NumPy, its BLAS and core type, precision, threads, and why."""
        blas = [lib for lib in self._controller.info() if lib["user_api"] == "blas"]
        names = {f"{b['internal_api']} {b.get('architecture', '')}".strip() for b in blas}
        pinned = os.environ.get(PIN)
        note = f", {PIN}={pinned} is set" if pinned else ""
        kernels = "compiled" if self.compiled else "plain NumPy"
        precision = self.dtype.name
        if self._splits:
            precision += " (products on AMX, in three bfloat16 parts)"
        if self._unit:
            precision = f"bfloat16 products ({self._unit}), sums in float32"
        return (
            f"numpy {np.__version__} ({', '.join(sorted(names)) or 'no BLAS found'}{note}), "
            f"{precision}, {self.threads} thread{'s' * (self.threads != 1)}, "
            f"kernels: {kernels}{self._hint}{self._why}"
        )

    def split(self, batch_size: int, length: int, flops: float) -> tuple[int, int]:
        """As many shards as threads, or fewer where a step is too small to gain by so many.

        A shard goes through its part in pieces, which stay in the cache and need less memory.
        Threads that a large step has left over because its batch is small go to BLAS.
        """
        worth = flops // SHARE_FLOPS if self.compiled else self.threads * (flops >= SHARD_FLOPS)
        shards = int(max(1, min(self.threads, batch_size, worth)))
        self._blas_threads = self.threads // shards if flops >= SHARD_FLOPS else 1
        share = -(-batch_size // shards)
        waits = self._unit and flops < ROW_FLOPS * batch_size * length
        rows = NARROW_ROWS if waits else PIECE_ROWS
        return shards, -(-share // max(1, rows // length))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Uninitialised memory."""
        return _aligned(shape, dtype, np.empty)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Zeroed memory."""
        return _aligned(shape, dtype, np.zeros)

    def upload(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        """Copy."""
        array[...] = host

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        """The array itself: the host is the device."""
        return array

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        """A copy, so that later steps do not change it."""
        return np.array(array)

    def ops(self, workspace: Array) -> Ops:
        """The reference operations, or the compiled ones."""
        if not self.compiled:
            return ReferenceOps(np, workspace)
        return self._kind()(np, workspace, self.dtype)

    def workspace_bytes(self, dims: Dims, rows: int, sequences: int = 0) -> int:
        """Scratch for batches of up to `rows` positions."""
        if not self.compiled:
            return workspace_bytes(dims, rows, self.dtype.itemsize)
        from ..ops import cpu

        return cpu.workspace_bytes(dims, rows, self.dtype.itemsize, self._kind())

    def _kind(self) -> type[CompiledOps]:
        """Which of the compiled operations."""
        from ..ops import cpu

        if self._splits:
            return cpu.SplitOps
        if not self._unit:
            return cpu.CompiledOps
        return cpu.AmxOps if self._unit == cpu.AMX_UNIT else cpu.DotOps

    @cached_property
    def _splits(self) -> bool:
        """Whether float32 is multiplied by AMX."""
        if not self.compiled or self._unit or self.dtype != np.float32:
            return False
        from ..ops import cpu

        return cpu.bf16_unit() == cpu.AMX_UNIT

    def pad_vocab(self, vocab_size: int) -> int:
        """No padding: BLAS takes any width."""
        return vocab_size

    def relu_mask_bytes(self, width: int) -> int:
        """None: the relu's output says it."""
        return 0

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run the tasks side by side, the first on this thread, the others on other cores: they may
        wait for one another."""
        others = [self.start_beside(i, partial(_quietly, t)) for i, t in enumerate(tasks[1:])]
        tasks[0]()
        for other in others:
            other.result()

    def start_beside(self, number: int, task: Callable[[], None]) -> Future[None]:
        """Begin the task on a thread of this number, from 0 on, on another core."""
        while len(self._beside) <= number:
            self._beside.append(Beside())
        return self._beside[number].start(task)

    def memory(self) -> int | None:
        """Bytes of physical memory, where the system tells."""
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None

    def memory_used(self) -> int | None:
        """Not said: it is the whole machine's."""
        return None

    def reserved(self) -> list[tuple[str, int]]:
        """Nothing."""
        return []

    def peak_flops(self) -> float | None:
        """Not known: `gpu-microgpt bench` measures it."""
        return None

    def __enter__(self) -> NumpyBackend:
        """Hold BLAS to its share of the threads until `__exit__`, and NumPy's warnings back.

        That a run diverges, the trainer says in one line. May be nested.
        """
        self._stack.append(ExitStack())
        limit = self._controller.limit(limits=self._blas_threads, user_api="blas")
        self._stack[-1].enter_context(limit)
        self._stack[-1].enter_context(np.errstate(all="ignore"))
        return self

    def __exit__(self, *_: object) -> None:
        """Give back what `__enter__` took; the outermost stops the threads."""
        self._stack.pop().close()
        if self._stack:
            return
        for thread in self._beside:
            thread.stop()
        self._beside.clear()


def _compiles(kernels: str) -> bool:
    """Whether the compiled operations are to compute; Numba is imported with them, not here."""
    if kernels == "reference":
        return False
    found = find_spec("numba") is not None
    if not found and kernels == "compiled":
        raise BackendError(f"kernels: got compiled, but Numba is not installed: {INSTALL}")
    return found


def _bf16_unit(kernels: str, compiled: bool) -> str:
    """What computes bfloat16 products here."""
    if not compiled:
        way = "kernels=compiled" if kernels == "reference" else INSTALL
        raise BackendError(f"dtype: got bf16, which needs compiled kernels: {way}, or dtype=fp32")
    from ..ops import cpu

    unit = cpu.bf16_unit()
    if not unit:
        raise BackendError(
            "dtype: got bf16, wanted a CPU with AMX or AVX512_BF16, which this one has not: "
            "dtype=fp32"
        )
    return unit


def _aligned(shape: tuple[int, ...], dtype: Any, make: Callable[..., Array]) -> Array:
    """An array whose first number lies where a cache line and the widest vector begin."""
    size = prod(shape) * np.dtype(dtype).itemsize
    raw = make(size + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + size].view(dtype).reshape(shape)


def _quietly(task: Callable[[], None]) -> None:
    """On another thread, where NumPy's warnings are to be held back anew."""
    with np.errstate(all="ignore"):
        task()
