"""Products on the stand-in GPU."""

from __future__ import annotations

import gc
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from gpu_microgpt.ops.cuda.cublaslt import Algorithm, Compute, Epilogue, Operand, Product
from gpu_microgpt.ops.cuda.gemm import After, Gemm
from tests.cuda.guarded import GuardedArray, peek
from tests.cuda.stand_in import StandInGpu
from tests.cuda.stand_in_cases import filled


def product(gpu: StandInGpu) -> tuple[Gemm, tuple[GuardedArray, ...]]:
    """And d, a, b of one."""
    workspace = gpu.empty((4 << 20,), np.uint8)
    gemm = Gemm(gpu.cublaslt, gpu.device, "fp32", workspace, gpu)
    return gemm, (gpu.empty((4, 4), np.float32), filled(gpu, 2, (4, 8)), filled(gpu, 3, (8, 4)))


def multiply_twice(gemm: Gemm, *arrays: GuardedArray) -> None:
    for _ in range(2):
        gemm.multiply(*arrays)


def test_products_are_recorded(gpu):
    gemm, (d, a, b) = product(gpu)
    with pytest.raises(AssertionError, match="while capturing"):
        gpu.capture(partial(gpu.cublaslt.heuristic, None, None, 0, 0, 1))
    gemm.multiply(d, a, b)
    assert (peek(d) == 48).all()
    assert gpu.counts["gemms"] > 1  # measured
    before = gpu.counts.copy()
    graph = gpu.capture(partial(multiply_twice, gemm, d, a, b))
    gemm.multiply(d, a, b)
    assert gpu.counts - before == {"captures": 1, "gemms": 1}
    gpu.upload(a, np.ones((4, 8), np.float32))
    assert (peek(d) == 48).all()
    graph.launch()
    assert (peek(d) == 24).all()
    assert graph.names == ["gemm", "gemm"]
    del a
    gc.collect()
    with pytest.raises(AssertionError, match="gemm: an array was freed"):
        graph.launch()


def test_products_with_masks_keep_their_own(gpu):
    gemm, (d, a, b) = product(gpu)
    masks = [gpu.empty((4, 16), np.uint8) for _ in range(2)]

    def both():
        for mask in masks:
            gemm.multiply(d, a, b, after=After(Epilogue.RELU_AUX, mask))

    both()
    graph = gpu.capture(both)
    for mask in masks:
        gpu.zero(mask)
    graph.launch()
    for mask in masks:
        assert (peek(mask)[:, 0] & 0xF == 0xF).all()


def test_products_of_freed_arrays_are_refused(gpu):
    gemm, (d, a, b) = product(gpu)
    work = gemm.product(d, a, b)
    work()
    del a
    gc.collect()
    with pytest.raises(AssertionError, match="in no array, or it was freed"):
        work()


def test_products_on_another_stream_are_refused(gpu):
    gemm, (d, a, b) = product(gpu)
    other = SimpleNamespace(stream=0, capturing=False, event=gpu.event)
    gemm = Gemm(gpu.cublaslt, gpu.device, "fp32", gemm.workspace, other)
    with pytest.raises(AssertionError, match="on stream 0x0, not 0x57"):
        gemm.multiply(d, a, b)


@pytest.mark.parametrize(
    ("shift", "rows", "aux", "message"),
    [
        (4, 5, 0, "wanted as aligned as planned"),
        (0, 3, 0, "64 bytes at 0x.* are in no array"),
        (0, 4, 64, "a mask, or none, that was not planned"),
    ],
)
def test_products_want_what_was_planned(gpu, shift, rows, aux, message):
    x = Operand(rows=4, columns=4, ld=4, dtype="float32", align=16)
    problem = Product(x, x, x, x, False, False, False, False, Compute.FLOAT32)
    operation = gpu.cublaslt.operation(problem)
    arrays = filled(gpu, 1, (4, 4)), filled(gpu, 1, (rows, 4)), gpu.empty((64,), np.uint8)
    a, d, space = (array.data.ptr for array in arrays)
    with pytest.raises(AssertionError, match=message):
        gpu.cublaslt.matmul(
            operation, Algorithm(), a, a, a, d + shift, aux, False, space, 64, gpu.stream
        )  # fmt: skip


def test_products_want_a_plan_before_they_are_captured(gpu):
    gemm, (d, a, b) = product(gpu)
    with pytest.raises(RuntimeError, match="while capturing"):
        gpu.capture(lambda: gemm.multiply(d, a, b))
