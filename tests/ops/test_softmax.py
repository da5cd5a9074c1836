from __future__ import annotations

import numpy as np
import pytest

from tests.gradcheck import check_gradients
from tests.op_cases import assert_close, blank, normal, planned_ops, twice

pytestmark = pytest.mark.usefixtures("implementation")

SHAPES = [(1, 1), (1, 3), (31, 33), (130, 4096)]  # the last is cut into blocks of rows


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])  # exp of either would overflow or vanish
@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_forward_is_the_formula_in_place_too(dtype, rows, vocab, shift):
    ops = planned_ops(dtype, rows, vocab=vocab)
    x = normal(dtype, rows, vocab, scale=3.0) + np.dtype(dtype).type(shift)

    def run():
        y, in_place = blank(dtype, rows, vocab), blank(dtype, rows, vocab)
        in_place[...] = x
        ops.softmax(y, x)
        ops.softmax(in_place, in_place)
        return y, in_place

    y, in_place = twice(run)
    exps = np.exp(x.astype(np.float64) - shift)
    assert_close(y, exps / exps.sum(-1, keepdims=True))
    assert np.array_equal(y, in_place)


def test_minus_infinity_gets_nothing(dtype):
    ops = planned_ops(dtype, 1, vocab=4)
    y = blank(dtype, 1, 4)
    ops.softmax(y, np.array([[0, -np.inf, 0, -np.inf]], dtype))
    assert y.tolist() == [[0.5, 0, 0.5, 0]]


@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_backward_is_the_formula_in_place_too(dtype, rows, vocab):
    ops = planned_ops(dtype, rows, vocab=vocab)
    y = np.abs(normal(dtype, rows, vocab)) + 1
    y /= y.sum(-1, keepdims=True)
    dy = normal(dtype, rows, vocab, seed=1)

    def run():
        dx, in_place = blank(dtype, rows, vocab), blank(dtype, rows, vocab)
        in_place[...] = dy
        ops.softmax_backward(dx, dy, y)
        ops.softmax_backward(in_place, in_place, y)
        return dx, in_place

    dx, in_place = twice(run)
    wide = y.astype(float)
    expected = wide * dy - wide * (wide * dy).sum(-1, keepdims=True)
    if vocab > 1:  # over one token nothing can change
        assert_close(dx, expected)
    assert np.array_equal(dx, in_place)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 3), (5, 7)])
def test_gradients(rows, vocab):
    ops = planned_ops("float64", rows, vocab=vocab)
    x, dy = normal("float64", rows, vocab), normal("float64", rows, vocab, seed=1)
    y, dx = blank("float64", rows, vocab), blank("float64", rows, vocab)

    def loss():
        ops.softmax(y, x)
        return float((y * dy).sum())

    loss()
    ops.softmax_backward(dx, dy, y)
    check_gradients(loss, {"x": x}, {"x": dx})
