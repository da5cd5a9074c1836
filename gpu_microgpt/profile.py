"""Where the time of a step goes: a table of its kernels, or on the CPU of its operations.

The first steps of a session are recorded. On a GPU they are done eagerly, each launch between two
events; everything that comes to the GPU's loader and to cuBLASLt is noted on its way, so that the
table has what was launched and nothing else.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .backend import Backend
from .backend.cuda import CudaBackend
from .ops.cuda.context import Grid, Kernel
from .ops.cuda.cublaslt import Operation, Product

PROFILED_STEPS = 10  # of a session; the first warms up and is not counted
HEAD = ["", "calls a step", "us a step", "share", "bytes a step", "GB/s", "TFLOP/s"]
HOST_NOTE = """\
Times are medians over the steps, by the host's clock, those of all threads together; shares are of
their total. Making batches and adding up the threads' gradients are not among them. Bytes are those
of the arrays an operation is given, each argument counted once and whole."""
GPU_NOTE = """\
Times are medians over the steps, between two events of the GPU around each launch; shares are of
their total. These steps were done eagerly: where the GPU is done before the next launch comes, a
time holds the host's for that launch, some microseconds a call. `advance` is the work of one
thread, so a call of it takes about that. In captured steps there are no such gaps, and small
kernels take less. Bytes are those of the arrays a kernel is given, each argument counted once and
whole: too few where it reads and writes one (`adamw`), too many where it looks some rows up
(`batch_gather`) or leaves padding out."""
# operations with matrix products: which argument has the weights' size, and how many products
PRODUCTS = {
    "linear": (2, 1), "linear_add": (2, 1), "linear_relu": (3, 1), "linear_backward": (1, 2),
    "relu_linear_backward": (1, 2),
}  # fmt: skip


class Launch(NamedTuple):
    """A kernel, a matrix product or an operation, once."""

    name: str
    nbytes: int
    flops: float  # of matrix products
    ms: Callable[[], float]  # may wait for the device
    grid: str = ""


@dataclass(frozen=True)
class Row:
    """All launches of one name: medians over the steps."""

    name: str
    calls: float
    microseconds: float
    bytes: float
    flops: float
    share: float  # of all rows' time
    grids: tuple[str, ...] = ()

    def cells(self) -> list[str]:
        """As they stand in the table."""
        us = self.microseconds
        rate = f"{self.bytes / us / 1e3:,.1f}" if us else ""
        tflops = f"{self.flops / us / 1e6:.3g}" if us and self.flops else ""
        numbers = [f"{self.calls:g}", f"{us:,.1f}", f"{self.share:.1%}", f"{self.bytes:,.0f}"]
        return [self.name, *numbers, rate, tflops]


@dataclass(frozen=True)
class Profile:
    """What the steps recorded came to."""

    machine: str
    steps: int
    kind: str  # of what a row is: kernel or operation
    note: str
    rows: list[Row]  # largest first

    def total(self) -> Row:
        """All rows together."""
        sums = [[r.calls, r.microseconds, r.bytes, r.flops, r.share] for r in self.rows]
        return Row("total", *np.sum(sums, axis=0).tolist())

    def markdown(self) -> str:
        """The table, its columns aligned to be read as plain text too."""
        cells = [row.cells() for row in (*self.rows, self.total())]
        cells = [[self.kind, *HEAD[1:]], *([f"`{name}`", *numbers] for name, *numbers in cells)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        table = "\n".join(
            f"| {row[0].ljust(widths[0])} | {' | '.join(map(str.rjust, row[1:], widths[1:]))} |"
            for row in cells
        )
        return f"# Profile of {self.steps} steps\n\n{self.machine}\n\n{table}\n\n{self.note}\n"

    def to_json(self) -> str:
        """All numbers."""
        return json.dumps(asdict(self) | {"total": asdict(self.total())}, indent=1) + "\n"

    def largest(self, count: int) -> str:
        """So many rows, a line each."""
        lines = [
            f"{r.share:6.1%} {r.microseconds:11,.1f} us  {r.calls:g} x {r.name}"
            for r in self.rows[:count]
        ]
        return "\n".join(lines)


class Profiler:
    """Records the operations of a session's first steps, by the host's clock."""

    kind, note = "operation", HOST_NOTE

    def __init__(self, steps: int = 0, machine: str = "") -> None:
        """Record so many steps (0: none), of which the first only warms up."""
        self.recording = False
        self._wanted, self._machine, self._begun = steps, machine, 0
        self._steps: list[list[Launch]] = []

    def range(self, name: str) -> AbstractContextManager[None]:
        """What is done inside, as `name` in a profiler's timeline where there is one."""
        return nullcontext()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The step is done inside."""
        self._begun += 1
        self.recording = 1 < self._begun <= self._wanted
        if self.recording:
            self._steps.append([])
        try:
            with self.range(f"step {number}"):
                yield
        finally:
            self.recording = False

    def watch(self, memories: Iterable[Any]) -> None:
        """Have the operations of these `Activations`, one a thread, recorded if any are to be."""
        for memory in memories if self._wanted else ():
            memory.ops = _TimedOps(memory.ops, self)

    def note_launch(self, launch: Launch) -> None:
        """Add it to the step that is recorded; threads may do so side by side."""
        self._steps[-1].append(launch)

    def take(self, at_end: bool = False) -> Profile | None:
        """The profile, once: after the last step to be recorded, or at the end with fewer, without
        rows where there was no second step. Waits for the device."""
        if not self._wanted or not (at_end or self._begun == self._wanted):
            return None
        rows, count = self.rows(), len(self._steps)
        self._wanted, self._steps = 0, []
        return Profile(self._machine, count, self.kind, self.note, rows)

    def rows(self) -> list[Row]:
        """What was recorded so far, the longest first."""
        sums: dict[str, Any] = defaultdict(lambda: np.zeros((len(self._steps), 4)))
        grids: dict[str, dict[str, None]] = defaultdict(dict)
        for i, step in enumerate(self._steps):
            for name, nbytes, flops, ms, grid in step:
                sums[name][i] += 1, 1e3 * ms(), nbytes, flops
                grids[name] |= {grid: None} if grid else {}
        medians = {name: np.median(values, axis=0).tolist() for name, values in sums.items()}
        total = sum(us for _, us, *_ in medians.values())
        rows = [
            Row(name, calls, us, nbytes, flops, us / total, tuple(grids[name]))
            for name, (calls, us, nbytes, flops) in medians.items()
        ]
        return sorted(rows, key=lambda row: -row.microseconds)


class _TimedOps:
    """Operations of one thread; each is noted while a step is recorded."""

    def __init__(self, ops: Any, profiler: Profiler) -> None:
        self._ops, self._profiler = ops, profiler

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._ops, name)
        return partial(self._timed, name, call) if self._profiler.recording else call

    def _timed(self, name: str, call: Callable[..., None], *args: Any) -> None:
        start = time.perf_counter()
        call(*args)
        ms = 1e3 * (time.perf_counter() - start)
        weights, products = PRODUCTS.get(name, (0, 0))
        flops = 2.0 * products * len(args[0]) * args[weights].size if products else 0.0
        nbytes = sum(arg.nbytes for arg in args if isinstance(arg, np.ndarray))
        self._profiler.note_launch(Launch(name, nbytes, flops, lambda: ms))


class GpuProfiler(Profiler):
    """Records the kernels and matrix products of a session's first steps, by the GPU's events."""

    kind, note = "kernel", GPU_NOTE

    def __init__(self, backend: CudaBackend, steps: int) -> None:
        """Stand between the backend and its GPU, before anything asks for operations."""
        super().__init__(steps, backend.describe())
        self._gpu = gpu = backend.gpu
        self._products: dict[Operation, Product] = {}
        watched: Any = _Instead(
            gpu,
            loader=_Instead(gpu.loader, function=self._function),
            cublaslt=_Instead(gpu.cublaslt, operation=self._operation, matmul=self._matmul),
        )
        backend.gpu = watched

    def range(self, name: str) -> AbstractContextManager[None]:
        """What is enqueued inside, as an NVTX range."""
        return self._gpu.range(name)

    def _function(
        self, stem: str, name: str, defines: tuple[str, ...], shared_mem: int = 0
    ) -> Kernel:
        """The loader's kernel, watched."""
        kernel = self._gpu.loader.function(stem, name, defines, shared_mem)

        def launch(grid: Grid, block: Grid, args: tuple[Any, ...], *, shared_mem: int = 0) -> None:
            work = partial(kernel, grid, block, args, shared_mem=shared_mem)
            nbytes = sum(int(arg.nbytes) for arg in args if not isinstance(arg, np.generic))
            self._launch(work, name, nbytes, grid=f"grid {grid}, block {block}")

        return launch

    def _operation(self, product: Product) -> Operation:
        """The library's; what it multiplies stays known."""
        operation = self._gpu.cublaslt.operation(product)
        self._products[operation] = product
        return operation

    def _matmul(self, operation: Operation, *args: Any) -> None:
        """The library's, watched."""
        p = self._products[operation]
        operands = (p.a, p.b, p.d, *([p.c] if p.beta else []))
        nbytes = sum(x.rows * x.columns * np.dtype(x.dtype).itemsize for x in operands)
        work = partial(self._gpu.cublaslt.matmul, operation, *args)
        nbytes += p.aux_ld // 8 * p.d.columns  # the mask
        self._launch(work, str(p), nbytes, 2.0 * p.d.rows * p.d.columns * p.inner)

    def _launch(
        self, work: Callable[[], None], name: str, nbytes: int, flops: float = 0, grid: str = ""
    ) -> None:
        """Enqueue `work`, between two events where it is to be recorded: no graph has room for
        them."""
        if not self.recording or self._gpu.capturing:
            return work()
        with self._gpu.range(name):
            before = self._gpu.event()
            work()
            after = self._gpu.event()
        self.note_launch(Launch(name, nbytes, flops, partial(after.ms_since, before), grid))


class _Instead:
    """An object of which some attributes are others."""

    def __init__(self, of: Any, **others: Any) -> None:
        self._of = of
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def make_profiler(backend: Backend, wanted: bool) -> Profiler:
    """One for a session that is about to begin; it does nothing where none is wanted."""
    if not wanted:
        return Profiler()
    if isinstance(backend, CudaBackend):
        return GpuProfiler(backend, PROFILED_STEPS)
    return Profiler(PROFILED_STEPS, backend.describe())
