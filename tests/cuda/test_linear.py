from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from gpu_microgpt.ops.cuda import CudaOps
from gpu_microgpt.ops.cuda.linear import relu_mask_bytes
from tests.cuda.machine import (
    DTYPES,
    Gpu,
    Machine,
    aligned,
    assert_twice_plain,
    normal,
    twice,
    wide,
)
from tests.cuda_on_cpu.cublaslt import library

# rows, inputs C, outputs F
SIZES = [(1, 1, 1), (31, 33, 7), (5, 7, 27), (64, 16, 66), (1, 66, 33), (65, 128, 512)]
MODES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16"}


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    library().fake_reset()
    yield
    library().fake_reset()


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def operations(machine: Machine, mode: str, fused: bool | None = None) -> CudaOps:
    """`fused`: whether relu is done in one with the product; None: as measured."""
    gemm = machine.gemm(mode)
    if fused is not None:
        gemm.fastest = lambda name, works: int(fused)  # type: ignore[method-assign]
    return machine.ops(DTYPES[MODES[mode]], gemm=gemm)


def single(x: np.ndarray, mode: str) -> np.ndarray:
    """As it enters a plain product in float32: TF32 keeps 10 bits of the mantissa."""
    x = x.astype(np.float32)
    if mode != "tf32":
        return x
    bits = x.view(np.uint32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & 0xFFFFE000).astype(np.uint32).view(np.float32)


def check(got: np.ndarray, a: np.ndarray, b: np.ndarray, mode: str, added=None, passed=None):
    """`got` is a b + added, where `passed`."""
    plain, truth = single(a, mode) @ single(b, mode), wide(a) @ wide(b)
    if added is not None:
        plain, truth = plain + added.astype(np.float32), truth + wide(added)
    if passed is not None:
        plain, truth = plain * passed, truth * passed
    assert_twice_plain(got, plain.astype(got.dtype), truth)


def apart(machine: Machine, host: np.ndarray, gap: int):
    """On the device, with `gap` more numbers (NaN) in every row."""
    whole = aligned((host.shape[0], host.shape[1] + gap), host.dtype)
    whole.reshape(-1).view(np.uint8)[...] = 0xFF
    whole[:, : host.shape[1]] = host
    return machine.array(whole)[:, : host.shape[1]]


@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize(("rows", "channels", "width"), SIZES)
def test_forward(one, mode, rows, channels, width, gap):
    dtype = DTYPES[MODES[mode]]
    x, w = normal(dtype, rows, channels), normal(dtype, width, channels, seed=1)
    residual = normal(dtype, rows, width, seed=2)
    ops = operations(one, mode)
    blank = np.full((rows, width), np.nan, dtype)

    def run():
        y, added = apart(one, blank, gap), apart(one, blank, gap)
        ops.linear(y, apart(one, x, gap), one.array(w))
        ops.linear_add(added, apart(one, x, 0), apart(one, w, gap), apart(one, residual, 2 * gap))
        return y, added

    y, added = twice(one, run)
    check(y, x, w.T, mode)
    check(added, x, w.T, mode, residual)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("rows", "channels", "width"), SIZES)
def test_backward(one, mode, rows, channels, width, add):
    dtype = DTYPES[MODES[mode]]
    x, w = normal(dtype, rows, channels), normal(dtype, width, channels, seed=1)
    dy, old = normal(dtype, rows, width, seed=2), normal(np.float32, width, channels, seed=3)
    ops = operations(one, mode)

    def run():
        dx, dw = one.blank(x.shape, dtype), one.blank(w.shape, np.float32)
        if add:
            dw = one.array(old)
        ops.linear_backward(dx, dw, apart(one, dy, 5), one.array(x), one.array(w), add)
        return dx, dw

    dx, dw = twice(one, run)
    check(dx, dy, w, mode)
    check(dw, dy.T, x, mode, old if add else None)


def relu_case(machine: Machine, ops: CudaOps, mode: str, sizes: tuple[int, int, int], bits: int):
    """y = max(x w1^T, 0) and the backward of y w2^T; returns arrays by name, from the host."""
    rows, channels, width = sizes
    dtype = DTYPES[MODES[mode]]
    host = {
        "x": normal(dtype, rows, channels), "w1": normal(dtype, width, channels, seed=1),
        "w2": normal(dtype, channels, width, seed=2), "dy": normal(dtype, rows, channels, seed=3),
    }  # fmt: skip
    x, w1, w2, dy = (machine.array(a) for a in host.values())
    masks = []  # their bits are what measuring left, where the kernel is faster

    def run():
        y, dx = machine.blank((rows, width), dtype), machine.blank((rows, width), dtype)
        dw, mask = machine.blank((channels, width), np.float32), machine.blank((rows, bits), "u1")
        ops.linear_relu(y, mask, x, w1)
        ops.relu_linear_backward(dx, dw, dy, y, mask, w2, False)
        masks.append(mask)
        return y, dx, dw

    y, dx, dw = twice(machine, run)
    return {**host, "y": y, "dx": dx, "dw": dw, "mask": machine.host(masks[-1])}


@pytest.mark.parametrize("fused", [False, True, None])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_relu(one, mode, sizes, masked, fused):
    if isinstance(one, Gpu) and fused:
        pytest.skip("NVIDIA's library may have no such algorithm")
    bits = relu_mask_bytes(sizes[2]) if masked else 0
    case = relu_case(one, operations(one, mode, fused), mode, sizes, bits)
    y, passed = case["y"], case["y"] > 0
    check(y, case["x"], case["w1"].T, mode, passed=wide(case["x"]) @ wide(case["w1"].T) > 0)
    check(case["dx"], case["dy"], case["w2"], mode, passed=passed)
    check(case["dw"], case["dy"].T, y, mode)
    if masked and fused:
        written = np.unpackbits(case["mask"], axis=1, bitorder="little")
        assert np.array_equal(written[:, : sizes[2]], passed)
        assert written[:, sizes[2] :].all()  # as they were


def test_without_such_algorithms_relu_is_a_kernel(mode, machine):
    if isinstance(machine, Gpu):
        pytest.skip("NVIDIA's library has what it has")
    library().fake_plain_only(1)
    case = relu_case(machine, operations(machine, mode), mode, (31, 33, 20), relu_mask_bytes(20))
    assert (case["mask"] == 0xFF).all()
    check(case["dx"], case["dy"], case["w2"], mode, passed=case["y"] > 0)


def test_backward_trusts_no_bits_but_the_last_forwards(one):
    if isinstance(one, Gpu):
        pytest.skip("NVIDIA's library may have no such algorithm")
    x, w = one.array(normal("f4", 5, 3)), one.array(normal("f4", 8, 3, seed=1))
    dy, w2 = normal("f4", 5, 3, seed=2), normal("f4", 3, 8)
    y, dx = one.blank((5, 8), "f4"), one.blank((5, 8), "f4")
    mask, dw = one.blank((5, 16), "u1"), one.blank((3, 8), "f4")
    gemm = one.gemm("fp32")
    ops = one.ops(np.float32, gemm=gemm)
    for fused in (True, False):  # the second forward leaves the bits of the first
        gemm.fastest = lambda name, works, fused=fused: int(fused)
        ops.linear_relu(y, mask, x if fused else one.array(-one.host(x)), w)
    gemm.fastest = lambda name, works: 1
    ops.relu_linear_backward(dx, dw, one.array(dy), y, mask, one.array(w2), False)
    check(one.host(dx), dy, w2, "fp32", passed=one.host(y) > 0)


def test_wrong_arguments_are_named(one):
    ops = operations(one, "bf16")
    x, w = one.blank((4, 8), DTYPES["bfloat16"]), one.blank((6, 8), DTYPES["bfloat16"])
    y, dw = one.blank((4, 6), DTYPES["bfloat16"]), one.blank((6, 8), np.float32)
    with pytest.raises(ValueError, match=r"linear: y: got bfloat16 \(3, 6\), wanted bfloat16 \(4,"):
        ops.linear(y[:3], x, w)
    with pytest.raises(ValueError, match=r"linear: w: got bfloat16 \(6, 7\), wanted .* \(6, 8\)"):
        ops.linear(y, x, w[:, :7])
    with pytest.raises(ValueError, match=r"linear: x: got strides .* wanted rows of neighbours"):
        ops.linear(y, x[:, ::2], w[:, :4])
    with pytest.raises(ValueError, match=r"linear_add: residual: got y, wanted another array"):
        ops.linear_add(y, x, w, y)
    with pytest.raises(ValueError, match=r"linear_backward: dw: got bfloat16 .* wanted float32"):
        ops.linear_backward(x, w, y, x, w, False)
    with pytest.raises(ValueError, match=r"linear: x: got numpy.ndarray, wanted .* on the device"):
        ops.linear(y, np.zeros((4, 8), DTYPES["bfloat16"]), w)
    with pytest.raises(ValueError, match=r"linear_relu: mask: got uint8 \(4, 1\), wanted .*4, 16"):
        ops.linear_relu(y, one.blank((4, 1), np.uint8), x, w)
    with pytest.raises(ValueError, match=r"relu_linear_backward: mask: got int32 .* wanted uint8"):
        ops.relu_linear_backward(x, dw, y, x, one.blank((4, 16), np.int32), w, False)
    with pytest.raises(ValueError, match="linear: got operations without matrix products"):
        one.ops(DTYPES["bfloat16"]).linear(y, x, w)


def test_bytes_of_a_mask():
    widths = (1, 127, 128, 129, 512)
    assert [relu_mask_bytes(width) for width in widths] == [16, 16, 16, 32, 64]
