from __future__ import annotations

import numpy as np
import pytest

from tests.gradcheck import check_gradients
from tests.op_cases import assert_close, blank, normal, planned_ops, twice

SHAPES = [(1, 1), (1, 7), (31, 33), (130, 4096)]  # the last is cut into blocks of rows


def reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float64)
    rstd = np.array([1 / np.sqrt(sum(row**2) / len(row) + 1e-5) for row in x])
    return x * rstd[:, None], rstd


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])  # at the first, eps weighs most
@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_forward_is_the_formula(dtype, rows, channels, scale):
    ops = planned_ops(dtype, rows, channels=channels)
    x = normal(dtype, rows, channels, scale=scale)

    def run():
        y, rstd = blank(dtype, rows, channels), blank(dtype, rows)
        ops.rmsnorm(y, rstd, x)
        return y, rstd

    y, rstd = twice(run)
    expected_y, expected_rstd = reference(x)
    assert_close(y, expected_y)
    assert_close(rstd, expected_rstd)


@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_backward_is_the_formula_in_place_and_added(dtype, rows, channels):
    ops = planned_ops(dtype, rows, channels=channels)
    x, dy = normal(dtype, rows, channels), normal(dtype, rows, channels, seed=1)
    upstream = normal(dtype, rows, channels, seed=2)
    y, rstd = (a.astype(dtype) for a in reference(x))

    def run():
        dx, added = blank(dtype, rows, channels), blank(dtype, rows, channels)
        in_place = blank(dtype, rows, channels)
        in_place[...], added[...] = dy, upstream
        ops.rmsnorm_backward(dx, dy, y, rstd)
        ops.rmsnorm_backward(in_place, in_place, y, rstd)
        ops.rmsnorm_backward_add(added, dy, y, rstd)
        return dx, in_place, added

    dx, in_place, added = twice(run)
    wide, r = x.astype(float), reference(x)[1][:, None]
    expected = r * dy - wide * r**3 * (dy * wide).sum(1, keepdims=True) / channels
    assert_close(dx, expected, size=np.abs(r * dy).max())  # where x ~ dy the terms cancel
    assert np.array_equal(dx, in_place)
    assert_close(added, upstream + expected)


@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (5, 7)])
def test_gradients(rows, channels):
    ops = planned_ops("float64", rows, channels=channels)
    x, dy = normal("float64", rows, channels), normal("float64", rows, channels, seed=1)
    y, rstd, dx = (blank("float64", *shape) for shape in (x.shape, (rows,), x.shape))

    def loss():
        ops.rmsnorm(y, rstd, x)
        return float((y * dy).sum())

    loss()
    ops.rmsnorm_backward(dx, dy, y, rstd)
    check_gradients(loss, {"x": x}, {"x": dx}, rtol=1e-8)
