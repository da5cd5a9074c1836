"""Matrix products: a plan for each shape, whose algorithm is measured before it is captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any, NamedTuple, Protocol

from ...errors import BackendError, DeviceError
from ...types import Array
from .arrays import pointer, row_stride
from .cublaslt import Algorithm, Compute, CublasLt, Epilogue, Operand, Operation, Product
from .device import Device
from .plan_cache import PlanCache

GEMM_WORKSPACE = 32 << 20  # bytes: what NVIDIA advises for Hopper
WORKSPACE_ALIGN = 256
WIDEST = 256  # bytes: no algorithm asks for a wider alignment
CANDIDATES = 16
ROUNDS = 5  # measurements of each, all candidates in turn, as clocks rise during the first
ROUND_MS, MAX_CALLS = 0.5, 8  # a measurement's length, and calls in it at most
MARGIN = 1.02  # what is slower by less is taken for equal; the library's own order decides then

# of operands' dtypes and arithmetic
MODES = {
    "bf16": ("bfloat16", Compute.FLOAT32),
    "tf32": ("float32", Compute.TF32),
    "fp32": ("float32", Compute.FLOAT32),
}


class Event(Protocol):
    """A place in the stream of work."""

    def ms_since(self, earlier: Any) -> float:
        """Milliseconds of the device from `earlier` to here; waits for both."""


class Queue(Protocol):
    """What is wanted of a GPU here."""

    stream: int  # the stream's handle
    capturing: bool

    def event(self) -> Event:
        """Enqueue an event."""


class Addresses(NamedTuple):
    """Where a product's matrices are on the device, and its mask or 0."""

    a: int
    b: int
    c: int
    d: int
    aux: int


class After(NamedTuple):
    """What a product does to its numbers before it writes them."""

    epilogue: Epilogue
    mask: Array | None = None  # (N, bytes) uint8, contiguous: a bit for each number


NOTHING = After(Epilogue.DEFAULT)


@dataclass(frozen=True)
class Plan:
    """How a product is done."""

    operation: Operation
    algorithm: Algorithm


class Gemm:
    """Matrix products of one GPU, in one arithmetic. Plans last as long as this does."""

    def __init__(
        self,
        cublaslt: CublasLt,
        device: Device,
        mode: str,
        workspace: Array,
        queue: Queue,
        cache: PlanCache | None = None,
    ) -> None:
        """`mode`: bf16, tf32 or fp32. `workspace`: uint8, at a multiple of 256 bytes, used by one
        product after another. `cache`: where choices last longer; None: nowhere.

        Raises BackendError where the GPU has no tensor cores for the mode.
        """
        if mode != "fp32" and not device.tensor_cores:
            raise BackendError(
                f"dtype: got {mode}, which {device.name} ({device.arch}) cannot multiply; wanted "
                "sm_80 (Ampere) or newer, or dtype=fp32"
            )
        if pointer(workspace) % WORKSPACE_ALIGN:
            raise ValueError(
                f"gemm: workspace: got address {pointer(workspace):#x}, wanted a multiple of "
                f"{WORKSPACE_ALIGN}"
            )
        self.mode, self.workspace = mode, workspace
        self.masks: set[int] = set()  # addresses of masks whose bits the last linear_relu wrote
        self._lt, self._device, self._queue, self._cache = cublaslt, device, queue, cache
        self._plans: dict[Product, Plan | None] = {}
        self._faster: dict[str, int] = {}

    def multiply(
        self, d: Array, a: Array, b: Array, *, transpose_a: bool = False, transpose_b: bool = False,
        c: Array | None = None, after: After = NOTHING,
    ) -> None:  # fmt: skip
        """d = after(op(a) op(b) + c), row-major; rows may lie apart. c may be d.

        The first product of its kind is measured, which calls it many times. Raises RuntimeError
        where that happens while capturing, BackendError where the library cannot do it.
        """
        work = self.product(
            d, a, b, transpose_a=transpose_a, transpose_b=transpose_b, c=c, after=after
        )
        if work is None:
            problem = self._product(d, a, b, transpose_a, transpose_b, c, after)
            raise BackendError(
                f"cuBLASLt {self._lt.version} has no algorithm on {self._device.name} for "
                f"{problem}: use dtype=fp32, or a newer CUDA"
            )
        work()

    def product(
        self, d: Array, a: Array, b: Array, *, transpose_a: bool = False, transpose_b: bool = False,
        c: Array | None = None, after: After = NOTHING,
    ) -> Callable[[], None] | None:  # fmt: skip
        """What enqueues that product, or None where the library has no algorithm for it."""
        problem = self._product(d, a, b, transpose_a, transpose_b, c, after)
        mask = 0 if after.mask is None else pointer(after.mask)
        # column-major, a row-major matrix is its transpose: D^T = op(B)^T op(A)^T
        added = pointer(d if c is None else c)
        addresses = Addresses(pointer(b), pointer(a), added, pointer(d), mask)
        if problem not in self._plans:
            self._plans[problem] = self._plan(problem, addresses)
        plan = self._plans[problem]
        if plan is None:
            return None
        operation, algorithm = plan.operation, plan.algorithm
        return lambda: self._enqueue(operation, algorithm, addresses, problem.beta)

    def fastest(self, name: str, works: Sequence[Callable[[], None]]) -> int:
        """Which of several ways to do a thing is the fastest: measured once for each name, and
        kept with the plans. Raises RuntimeError where that happens while capturing."""
        if name not in self._faster:
            kept = self._kept(name)
            if kept not in {str(i) for i in range(len(works))}:
                self._refuse_capture(name)
                kept = str(_first_of_the_fastest(self._measure(works)))
                self._keep(name, kept)
            self._faster[name] = int(kept)
        return self._faster[name]

    def _plan(self, problem: Product, addresses: Addresses) -> Plan | None:
        """The algorithm that was kept, or else the fastest of the library's proposals."""
        self._refuse_capture(str(problem))
        operation = self._lt.operation(problem)
        aux, size = addresses.aux, self.workspace.nbytes
        kept = _algorithm(self._kept(repr(problem)))
        if kept is not None and self._lt.fits(operation, kept, aux, size):
            return Plan(operation, kept)
        found = self._lt.heuristic(problem, operation, aux, size, CANDIDATES)
        found = [one for one in found if self._lt.fits(operation, one, aux, size)]
        chosen = self._choose(problem, operation, found, addresses) if found else None
        if chosen is None:
            return None
        self._keep(repr(problem), bytes(chosen).hex())
        return Plan(operation, chosen)

    def _choose(
        self,
        problem: Product,
        operation: Operation,
        found: list[Algorithm],
        addresses: Addresses,
    ) -> Algorithm | None:
        """Measure on the real arrays, which the product overwrites anyway; None where the library
        refuses to do what it has proposed.

        What it adds to itself would be added many times: then the algorithm of the plain product of
        the same shape is taken, which did the first micro-batch, or else the library's first.
        """
        if problem.in_place:
            plain = self._plans.get(problem._replace(beta=False, in_place=False))
            size = self.workspace.nbytes
            if plain and self._lt.fits(operation, plain.algorithm, addresses.aux, size):
                return plain.algorithm
            return found[0]

        def work(algorithm: Algorithm) -> Callable[[], None]:
            return lambda: self._enqueue(operation, algorithm, addresses, problem.beta)

        times = self._measure([work(algorithm) for algorithm in found])
        return None if min(times) == inf else found[_first_of_the_fastest(times)]

    def _measure(self, works: Sequence[Callable[[], None]]) -> list[float]:
        """Milliseconds of each, the median of several rounds; infinite for what is refused."""
        if len(works) == 1:
            return [0.0]
        calls = []
        for work in works:
            try:
                work()  # the first call may load the kernel
            except (BackendError, DeviceError):  # what it proposes, it may yet not do
                self._queue.event()  # a GPU that is lost says so here
                calls.append(0)
                continue
            calls.append(max(1, min(MAX_CALLS, int(ROUND_MS / max(self._ms(work, 1), 1e-6)))))
        rounds = [
            [self._ms(work, n) if n else inf for work, n in zip(works, calls, strict=True)]
            for _ in range(ROUNDS)
        ]
        return [median(times) for times in zip(*rounds, strict=True)]

    def _ms(self, work: Callable[[], None], calls: int) -> float:
        before = self._queue.event()
        for _ in range(calls):
            work()
        return self._queue.event().ms_since(before) / calls

    def _enqueue(
        self, operation: Operation, algorithm: Algorithm, addresses: Addresses, beta: bool
    ) -> None:
        space = (pointer(self.workspace), self.workspace.nbytes)
        self._lt.matmul(operation, algorithm, *addresses, beta, *space, self._queue.stream)

    def _product(
        self, d: Array, a: Array, b: Array, transpose_a: bool, transpose_b: bool, c: Array | None,
        after: After,
    ) -> Product:  # fmt: skip
        """Our row-major product as the library's column-major one, operands swapped."""
        into = _operand(d)
        mask = after.mask
        return Product(
            _operand(b), _operand(a), into if c is None else _operand(c), into,
            transpose_b, transpose_a, c is not None,
            c is not None and pointer(c) == pointer(d),
            MODES[self.mode][1], after.epilogue,
            0 if mask is None else 8 * int(mask.shape[1]),
            0 if mask is None else _alignment(pointer(mask)),
        )  # fmt: skip

    def _refuse_capture(self, name: str) -> None:
        if self._queue.capturing:
            raise RuntimeError(
                f"{name}: got a first call while capturing, wanted it planned: call once before"
            )

    @property
    def machine(self) -> str:
        """What a choice of algorithms holds for."""
        device = self._device
        return f"{device.name} {device.arch} cuBLASLt {self._lt.version} {self.mode}"

    def _kept(self, problem: str) -> str | None:
        return None if self._cache is None else self._cache.get(self.machine, problem)

    def _keep(self, problem: str, choice: str) -> None:
        if self._cache is not None:
            self._cache.put(self.machine, problem, choice)


def _operand(x: Array) -> Operand:
    """A row-major (N, C) matrix as a column-major (C, N) one."""
    rows, columns = (int(size) for size in x.shape)
    ld = row_stride(x)
    align = _alignment(pointer(x) | ld * int(x.dtype.itemsize))
    return Operand(columns, rows, ld, x.dtype.name, align)


def _alignment(address: int) -> int:
    """The largest power of two that divides it, up to the widest that matters."""
    return (address | WIDEST) & -(address | WIDEST)


def _algorithm(kept: str | None) -> Algorithm | None:
    """From hexadecimal digits; None where they are not an algorithm's."""
    try:
        return Algorithm.from_buffer_copy(bytes.fromhex(kept or ""))
    except ValueError:
        return None


def _first_of_the_fastest(times: Sequence[float]) -> int:
    fastest = min(times) * MARGIN
    return next(i for i, ms in enumerate(times) if ms <= fastest)
