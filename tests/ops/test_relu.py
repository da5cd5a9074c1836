from __future__ import annotations

import numpy as np
import pytest

from tests.gradcheck import away_from_zero, check_gradients
from tests.op_cases import blank, normal, planned_ops, twice

pytestmark = pytest.mark.usefixtures("implementation")

SHAPES = [(1, 4), (31, 36), (600, 512)]  # rows, width; the last is cut into blocks of rows


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_forward_and_backward_are_exact_and_work_in_place(dtype, rows, width):
    ops = planned_ops(dtype, rows, channels=width // 4)
    x, dy = normal(dtype, rows, width), normal(dtype, rows, width, seed=1)
    x[0, :3] = 0, -0.0, 1e-30

    def run():
        y, dx = blank(dtype, rows, width), blank(dtype, rows, width)
        y_in_place, dx_in_place = blank(dtype, rows, width), blank(dtype, rows, width)
        y_in_place[...], dx_in_place[...] = x, dy
        ops.relu(y, x)
        ops.relu(y_in_place, y_in_place)
        ops.relu_backward(dx, dy, y)
        ops.relu_backward(dx_in_place, dx_in_place, y_in_place)
        return y, y_in_place, dx, dx_in_place

    y, y_in_place, dx, dx_in_place = twice(run)
    assert np.array_equal(y, np.where(x > 0, x, 0))
    assert np.array_equal(dx, np.where(x > 0, dy, 0))
    assert np.array_equal(y, y_in_place)
    assert np.array_equal(dx, dx_in_place)


def test_gradients():
    ops = planned_ops("float64", 5, channels=2)
    x, dy = away_from_zero(normal("float64", 5, 7)), normal("float64", 5, 7, seed=1)
    y, dx = blank("float64", 5, 7), blank("float64", 5, 7)

    def loss():
        ops.relu(y, x)
        return float((y * dy).sum())

    loss()
    ops.relu_backward(dx, dy, y)
    check_gradients(loss, {"x": x}, {"x": dx})
