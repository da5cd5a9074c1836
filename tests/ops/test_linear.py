from __future__ import annotations

import numpy as np
import pytest

from tests.gradcheck import check_gradients
from tests.op_cases import assert_close, blank, normal, planned_ops, twice

pytestmark = pytest.mark.usefixtures("implementation")

# rows, inputs C, outputs F
SHAPES = [
    (1, 1, 1), (31, 33, 7), (33, 5, 20), (300, 64, 256), (7, 12, 999), (1, 64, 27), (9, 64, 27),
    (260, 100, 66), (12, 528, 40),
]  # fmt: skip


def operations(dtype, rows, channels, width):
    """An output of up to 4C is an inner width of the model; a wider one, its vocabulary."""
    return planned_ops(dtype, rows, channels=channels, vocab=width)


@pytest.mark.parametrize(("rows", "channels", "width"), SHAPES)
def test_forward_is_the_product(dtype, rows, channels, width):
    ops = operations(dtype, rows, channels, width)
    x, w = normal(dtype, rows, channels), normal(dtype, width, channels, seed=1)
    residual = normal(dtype, rows, width, seed=2)

    def run():
        y, added = blank(dtype, rows, width), blank(dtype, rows, width)
        ops.linear(y, x, w)
        ops.linear_add(added, x, w, residual)
        return y, added

    y, added = twice(run)
    wide = (x[:, None].astype(float) * w).sum(-1)
    assert_close(y, wide)
    assert_close(added, residual + wide)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("rows", "channels", "width"), SHAPES)
def test_backward_is_both_products(dtype, rows, channels, width, add):
    ops = operations(dtype, rows, channels, width)
    x, w = normal(dtype, rows, channels), normal(dtype, width, channels, seed=1)
    dy, old = normal(dtype, rows, width, seed=2), normal(dtype, width, channels, seed=3)

    def run():
        dx, dw = blank(dtype, rows, channels), blank(dtype, width, channels)
        if add:
            dw[...] = old
        ops.linear_backward(dx, dw, dy, x, w, add)
        return dx, dw

    dx, dw = twice(run)
    assert_close(dx, (dy[:, :, None].astype(float) * w).sum(1))
    assert_close(dw, (dy[:, :, None].astype(float) * x[:, None]).sum(0) + (old if add else 0))


@pytest.mark.parametrize(("rows", "channels", "width"), [(1, 1, 1), (5, 3, 7)])
def test_gradients(rows, channels, width):
    ops = operations("float64", rows, channels, width)
    x, w = normal("float64", rows, channels), normal("float64", width, channels, seed=1)
    residual, dy = (normal("float64", rows, width, seed=s) for s in (2, 3))
    y = blank("float64", rows, width)

    def loss():
        ops.linear_add(y, x, w, residual)
        return float((y * dy).sum())

    dx, dw = blank("float64", rows, channels), blank("float64", width, channels)
    ops.linear_backward(dx, dw, dy, x, w, add=False)
    arrays = {"x": x, "w": w, "residual": residual}
    check_gradients(loss, arrays, {"x": dx, "w": dw, "residual": dy})


def relu_case(dtype, rows, channels, width):
    """x, w1, w2, dy: y = max(x w1^T, 0), then y w2^T."""
    x, w1 = normal(dtype, rows, channels), normal(dtype, width, channels, seed=1)
    w2, dy = normal(dtype, channels, width, seed=2), normal(dtype, rows, channels, seed=3)
    return x, w1, w2, dy


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("rows", "channels", "width"), [(1, 1, 1), (31, 33, 130), (300, 64, 256)])
def test_relu_is_composed_of_both(dtype, rows, channels, width, add):
    ops = operations(dtype, rows, channels, width)
    x, w1, w2, dy = relu_case(dtype, rows, channels, width)
    old = normal(dtype, channels, width, seed=4)
    mask = np.full((rows, 16), 7, np.uint8)

    def run():
        y, dz = blank(dtype, rows, width), blank(dtype, rows, width)
        dw = blank(dtype, channels, width)
        if add:
            dw[...] = old
        ops.linear_relu(y, mask, x, w1)
        ops.relu_linear_backward(dz, dw, dy, y, mask, w2, add)
        return y, dz, dw

    y, dz, dw = twice(run)
    plain, dplain = blank(dtype, rows, width), blank(dtype, rows, width)
    dw_plain = old.copy() if add else blank(dtype, channels, width)
    ops.linear(plain, x, w1)
    ops.relu(plain, plain)
    ops.linear_backward(dplain, dw_plain, dy, plain, w2, add)
    ops.relu_backward(dplain, dplain, plain)
    for got, expected in ((y, plain), (dz, dplain), (dw, dw_plain)):
        assert got.tobytes() == expected.tobytes()
    assert (mask == 7).all()


@pytest.mark.parametrize(("rows", "channels", "width"), [(1, 1, 1), (5, 3, 7)])
def test_relu_gradients(rows, channels, width):
    """The loss is through both products, and z = x w1^T is differentiated through the relu."""
    ops = operations("float64", rows, channels, width)
    x, w1, w2, dy = relu_case("float64", rows, channels, width)
    y, out = blank("float64", rows, width), blank("float64", rows, channels)
    mask = np.zeros((rows, 0), np.uint8)

    def loss():
        ops.linear_relu(y, mask, x, w1)
        ops.linear(out, y, w2)
        return float((out * dy).sum())

    loss()
    dz, dx = blank("float64", rows, width), blank("float64", rows, channels)
    dw2, dw1 = blank("float64", channels, width), blank("float64", width, channels)
    ops.relu_linear_backward(dz, dw2, dy, y, mask, w2, add=False)
    ops.linear_backward(dx, dw1, dz, x, w1, add=False)
    check_gradients(loss, {"x": x, "w1": w1, "w2": w2}, {"x": dx, "w1": dw1, "w2": dw2})


def test_inputs_stay():
    ops = operations("float32", 5, 3, 7)
    x, w, dy = (normal("float32", *shape) for shape in ((5, 3), (7, 3), (5, 7)))
    before = [a.copy() for a in (x, w, dy)]
    ops.linear_backward(blank("float32", 5, 3), blank("float32", 7, 3), dy, x, w, add=False)
    ops.linear_add(blank("float32", 5, 7), x, w, dy)
    assert all(np.array_equal(a, b) for a, b in zip((x, w, dy), before, strict=True))
