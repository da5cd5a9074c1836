"""Plans of matrix products: how algorithms are chosen, and refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from gpu_microgpt.errors import BackendError, DeviceError
from gpu_microgpt.ops.cuda.cublaslt import Algorithm, CublasLt, Epilogue, Operation
from gpu_microgpt.ops.cuda.device import KNOWN
from gpu_microgpt.ops.cuda.gemm import After, Gemm
from tests.cuda.gemm_cases import MIB, Clock, W, X, make, on_device, product, used
from tests.cuda.machine import aligned
from tests.cuda_on_cpu.cublaslt import library


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    library().fake_reset()
    yield
    library().fake_reset()


@pytest.mark.parametrize("fastest", [1, 2, 3])
def test_the_fastest_is_taken(fastest):
    gemm, _ = make({1: 1.0, 2: 1.0, 3: 1.0, fastest: 0.5})
    product(gemm)
    assert used() == fastest
    before = library().fake_matmuls()
    product(gemm)
    assert (used(), library().fake_matmuls()) == (fastest, before + 1)


def test_equals_keep_the_librarys_order():
    gemm, _ = make({1: 1.0, 2: 0.99, 3: 1.01})
    product(gemm)
    assert used() == 1


def test_long_products_are_measured_with_fewer_calls():
    calls = []
    for ms in (0.01, 10.0):
        library().fake_reset()
        product(make(dict.fromkeys((1, 2, 3), ms))[0])
        calls.append(library().fake_matmuls())
    assert calls == [3 * (2 + 5 * 8) + 1, 3 * (2 + 5) + 1]


def test_one_algorithm_is_not_measured():
    library().fake_algorithms(1, 1)
    product(make()[0])
    assert library().fake_matmuls() == 1


def test_algorithms_fit_the_workspace():
    gemm, _ = make({1: 1.0, 2: 0.9, 3: 0.1}, nbytes=MIB)
    product(gemm)
    assert used() == 2  # the third wants 2 MiB


def test_a_plan_while_capturing_is_refused():
    gemm, clock = make()
    clock.capturing = True
    with pytest.raises(
        RuntimeError, match=r"float32 \(5, 16\) x \(16, 7\) -> float32: got a first call while cap"
    ):
        product(gemm)
    clock.capturing = False
    product(gemm)
    clock.capturing = True
    product(gemm)
    with pytest.raises(RuntimeError, match="one or the other: got a first call while capturing"):
        gemm.fastest("one or the other", (lambda: None, lambda: None))


@pytest.mark.parametrize("planned", [False, True])
def test_what_is_added_to_itself_is_added_once(planned):
    gemm, _ = make({1: 1.0, 2: 0.5, 3: 1.0})
    if planned:
        product(gemm)
    x, w, y = on_device(X), on_device(W), on_device(np.ones((5, 7), np.float32))
    before = library().fake_matmuls()
    gemm.multiply(y, x, w, transpose_b=True, c=y)
    assert library().fake_matmuls() == before + 1
    assert used() == (2 if planned else 1)
    assert np.allclose(y, 1 + X @ W.T, atol=1e-5)


def test_another_alignment_is_another_plan():
    """An algorithm for aligned arrays is refused by the library for others."""
    gemm, _ = make()
    for skip in (0, 64, 16, 4):
        assert np.allclose(product(gemm, skip), X @ W.T, atol=1e-5)
    assert library().fake_heuristics() == 3  # rows of y, 28 bytes apart: to 64 all is the same


def refusing(
    gemm: Gemm,
    monkeypatch: pytest.MonkeyPatch,
    *refused: int,
    error: type[Exception] = BackendError,
) -> None:
    """The library proposes these algorithms, and then does nothing by them."""
    matmul = gemm._lt.matmul

    def some(operation: Operation, algorithm: Algorithm, *args: object) -> None:
        if algorithm.data[0] >> 32 in refused:
            raise error("refused")
        matmul(operation, algorithm, *args)

    monkeypatch.setattr(gemm._lt, "matmul", some)


def test_what_is_refused_after_all_is_not_taken(monkeypatch):
    gemm, _ = make({1: 0.1, 2: 1.0, 3: 0.5})
    refusing(gemm, monkeypatch, 1)
    assert np.allclose(product(gemm), X @ W.T, atol=1e-5)
    assert used() == 3
    gemm, _ = make()
    refusing(gemm, monkeypatch, 1, 2, 3)
    with pytest.raises(BackendError, match="cuBLASLt 900000 has no algorithm on H200 for float32"):
        product(gemm)


def test_a_refusal_is_told_from_a_lost_gpu(monkeypatch):
    gemm, _ = make()
    refusing(gemm, monkeypatch, 1, error=DeviceError)
    product(gemm)
    assert used() == 2
    gemm, clock = make()
    refusing(gemm, monkeypatch, 1, error=DeviceError)

    def lost() -> None:
        raise DeviceError("the GPU is lost")

    monkeypatch.setattr(clock, "event", lost)
    with pytest.raises(DeviceError, match="the GPU is lost"):
        product(gemm)


def test_no_algorithm():
    library().fake_unsupported(1)
    with pytest.raises(BackendError) as failure:
        product(make(mode="bf16")[0], dtype="bfloat16")
    assert str(failure.value) == (
        "cuBLASLt 900000 has no algorithm on H200 for bfloat16 (5, 16) x (16, 7) -> bfloat16: use "
        "dtype=fp32, or a newer CUDA"
    )


@pytest.mark.parametrize(
    ("status", "error"), [(13, DeviceError), (14, DeviceError), (7, BackendError)]
)
def test_a_failed_product_is_said(status, error):
    gemm, _ = make()
    product(gemm)
    library().fake_failure(status)
    with pytest.raises(error, match=rf"cuBLASLt 900000: cublasLtMatmul: status {status}, "):
        product(gemm)


def test_no_algorithm_for_an_epilogue_is_none():
    gemm, _ = make()
    x, w, y = on_device(X), on_device(W), on_device(np.zeros((5, 7), np.float32))
    mask = aligned((5, 16), np.dtype(np.uint8))
    for after in (After(Epilogue.RELU), After(Epilogue.RELU_AUX, mask)):
        assert gemm.product(y, x, w, transpose_b=True, after=after) is not None
    library().fake_plain_only(1)
    gemm, _ = make()
    for after in (After(Epilogue.RELU), After(Epilogue.RELU_AUX, mask)):
        assert gemm.product(y, x, w, transpose_b=True, after=after) is None
    assert gemm.product(y, x, w, transpose_b=True) is not None


def test_one_plan_serves_every_layers_mask():
    gemm, _ = make()
    w, y = on_device(W), on_device(np.zeros((5, 7), np.float32))
    masks = [aligned((5, 16), np.dtype(np.uint8)) for _ in range(2)]
    for x, mask in zip((X, -X), masks, strict=True):
        after = After(Epilogue.RELU_AUX, mask)
        gemm.multiply(y, on_device(x), w, transpose_b=True, after=after)
    for x, mask in zip((X, -X), masks, strict=True):
        bits = np.unpackbits(mask, axis=1, bitorder="little")[:, :7]
        assert np.array_equal(bits, x @ W.T > 0)
    assert library().fake_heuristics() == 1


@pytest.mark.parametrize("mode", ["bf16", "tf32"])
def test_old_gpus_cannot(mode):
    with pytest.raises(BackendError, match=rf"dtype: got {mode}, which Tesla T4 \(sm_75\) cannot"):
        make(mode=mode, device=KNOWN["sm_75"])
    make(mode="fp32", device=KNOWN["sm_75"])


def test_the_workspace_is_aligned():
    with pytest.raises(
        ValueError, match=r"gemm: workspace: got address .* wanted a multiple of 256"
    ):
        Gemm(
            CublasLt(library()), KNOWN["sm_90"], "fp32", aligned((99,), np.dtype("u1"))[1:], Clock()
        )
