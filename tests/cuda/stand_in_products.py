"""Products on the stand-in GPU: the binding as it is, over a library that computes on the CPU."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_microgpt.ops.cuda.cublaslt import Algorithm, CublasLt, Operand, Operation, Product
from tests.cuda.guarded import Memory
from tests.cuda.stand_in_work import Work
from tests.cuda_on_cpu import cublaslt

if TYPE_CHECKING:
    from tests.cuda.stand_in import StandInGpu


class StandInCublasLt(CublasLt):
    """Products are checked, then done or recorded; no algorithm is chosen while capturing."""

    def __init__(self, gpu: StandInGpu) -> None:
        """Its products come to `gpu`."""
        super().__init__(cublaslt.library())
        self._gpu: StandInGpu = weakref.proxy(gpu)
        self._products: weakref.WeakKeyDictionary[Operation, Product] = weakref.WeakKeyDictionary()

    def operation(self, product: Product) -> Operation:
        operation = super().operation(product)
        self._products[operation] = product
        return operation

    def heuristic(self, *args: Any) -> list[Algorithm]:
        self._gpu.not_captured("choosing an algorithm")
        return super().heuristic(*args)

    def matmul(
        self, operation: Operation, algorithm: Algorithm, a: int, b: int, c: int, d: int, aux: int,
        beta: bool, workspace: int, workspace_bytes: int, stream: int,
    ) -> None:  # fmt: skip
        """Raises AssertionError for addresses where no such matrix can lie, or another stream."""
        gpu, product = self._gpu, self._products[operation]
        assert stream == gpu.stream, f"product: on stream {stream:#x}, not {gpu.stream:#x}"
        assert bool(aux) == bool(product.aux_ld), "product: a mask, or none, that was not planned"
        assert not aux or aux % product.aux_align == 0, f"product: mask at {aux:#x}"
        matrices = zip((a, b, c, d), product[:4], strict=True)
        memories = [self._memory(address, operand) for address, operand in matrices]
        memories += [gpu.heap.find(aux, product.aux_ld // 8 * product.d.columns)] if aux else []
        space = gpu.heap.find(workspace, workspace_bytes)
        baked = Algorithm.from_buffer_copy(algorithm)
        run = partial(
            super().matmul, operation, baked, a, b, c, d, aux, beta, workspace, workspace_bytes,
            stream,
        )  # fmt: skip
        refs = tuple(weakref.ref(memory) for memory in (*memories, space))
        gpu.launch(Work("gemms", "gemm", run, refs))

    def _memory(self, address: int, x: Operand) -> Memory:
        """Of a column-major matrix."""
        assert address % x.align == 0, f"product: {x} at {address:#x}, wanted as aligned as planned"
        numbers = (x.columns - 1) * x.ld + x.rows
        return self._gpu.heap.find(address, numbers * np.dtype(x.dtype).itemsize)


class MemoryPlans:
    """`PlanCache` for the length of a test: nothing of it comes to the user's folder."""

    def __init__(self) -> None:
        self._choices: dict[tuple[str, str], str] = {}

    def get(self, machine: str, problem: str) -> str | None:
        return self._choices.get((machine, problem))

    def put(self, machine: str, problem: str, choice: str) -> None:
        self._choices[machine, problem] = choice
