from __future__ import annotations

import numpy as np
import pytest

from tests.gradcheck import check_gradients
from tests.op_cases import assert_close, blank, normal, planned_ops, twice

pytestmark = pytest.mark.usefixtures("implementation")

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


def test_forward_in_place(dtype):
    ops = planned_ops(dtype, 31, channels=33)
    x = normal(dtype, 31, 33)
    y, rstd, again = blank(dtype, 31, 33), blank(dtype, 31), blank(dtype, 31)
    ops.rmsnorm(y, rstd, x)
    ops.rmsnorm(x, again, x)
    assert np.array_equal(x, y)
    assert np.array_equal(again, rstd)


@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_of_the_embedding(dtype, rows, channels):
    ops = planned_ops(dtype, rows, channels=channels, block_size=9, vocab=11)
    wte, wpe = normal(dtype, 11, channels), normal(dtype, 9, channels, seed=1)
    tokens, positions = (np.arange(rows, dtype=np.int32) * 7 % n for n in (11, 9))
    embedded, expected, expected_rstd = (
        blank(dtype, *shape) for shape in ((rows, channels), (rows, channels), (rows,))
    )
    ops.embedding(embedded, tokens, positions, wte, wpe)
    ops.rmsnorm(expected, expected_rstd, embedded)

    def run():
        y, rstd = blank(dtype, rows, channels), blank(dtype, rows)
        ops.embedding_rmsnorm(y, rstd, tokens, positions, wte, wpe)
        return y, rstd

    y, rstd = twice(run)
    assert np.array_equal(y, expected)
    assert np.array_equal(rstd, expected_rstd)


@pytest.mark.parametrize("over", ["x", "residual", "branch"])
@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_of_a_sum(dtype, rows, channels, over):
    ops = planned_ops(dtype, rows, channels=channels)
    residual, branch = normal(dtype, rows, channels), normal(dtype, rows, channels, seed=1)
    expected, expected_rstd = blank(dtype, rows, channels), blank(dtype, rows)
    ops.rmsnorm(expected, expected_rstd, residual + branch)

    def run():
        x, y, rstd = blank(dtype, rows, channels), blank(dtype, rows, channels), blank(dtype, rows)
        given = {"residual": residual, "branch": branch}
        if over in given:
            x[...] = given[over]
            given[over] = x
        ops.add_rmsnorm(x, y, rstd, **given)
        return x, y, rstd

    x, y, rstd = twice(run)
    assert np.array_equal(x, residual + branch)
    assert np.array_equal(y, expected)
    assert np.array_equal(rstd, expected_rstd)


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
