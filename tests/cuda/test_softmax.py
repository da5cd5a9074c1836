from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import ml_dtypes
import numpy as np
import pytest

from tests.cuda.machine import DTYPES, Machine, assert_twice_plain, normal, twice, wide

launcher = import_module("gpu_microgpt.ops.cuda.softmax")  # not the function of this name

# (rows, width, padding): a warp or a block a row, rows 16-byte aligned or not
SHAPES = [
    (1, 1, 0), (7, 3, 0), (33, 27, 0), (5, 64, 0), (3, 66, 62), (2, 1000, 24),
    (2, 1025, 0), (2, 1028, 4), (2, 50257, 0), (2, 50257, 47),
]  # fmt: skip


def formula(x: np.ndarray) -> np.ndarray:
    exps = np.exp(x - x.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def slope(dy: np.ndarray, y: np.ndarray) -> np.ndarray:
    return y * (dy - (dy * y).sum(-1, keepdims=True))


def in_rows(machine, values, padding):
    """A view of longer rows, NaN between them, and the whole."""
    rows, width = values.shape
    whole = np.full((rows, width + padding), np.nan, values.dtype)
    whole[:, :width] = values
    whole = machine.array(whole)
    return whole[:, :width], whole


def check(machine, dtype, rows, width, padding, shift=0.0):
    dtype = DTYPES[dtype]
    x = (normal(dtype, rows, width, scale=3.0).astype(np.float32) + np.float32(shift)).astype(dtype)
    dy = normal(dtype, rows, width, seed=1)
    ops = machine.ops(dtype)
    blank = np.full(x.shape, np.nan, dtype)

    def run():
        y, whole_y = in_rows(machine, blank, padding)
        dx, whole_dx = in_rows(machine, blank, padding)
        ops.softmax(y, in_rows(machine, x, padding)[0])
        ops.softmax_backward(dx, in_rows(machine, dy, padding)[0], y)
        for whole in (whole_y, whole_dx):
            assert np.isnan(wide(machine.host(whole))[:, width:]).all()
        x_y, dy_dx = (in_rows(machine, a, padding)[0] for a in (x, dy))
        ops.softmax(x_y, x_y)
        ops.softmax_backward(dy_dx, dy_dx, x_y)
        return y, dx, x_y, dy_dx

    y, dx, y_in_place, dx_in_place = twice(machine, run)
    single = x.astype(np.float32)
    assert_twice_plain(y, formula(single).astype(dtype), formula(wide(x)))
    plain = slope(dy.astype(np.float32), y.astype(np.float32)).astype(dtype)
    truth = slope(wide(dy), wide(y))
    error, allowed = (np.abs(wide(a) - truth).max() for a in (dx, plain))
    eps = np.abs(dy).max().astype(float) * 2.0**-23  # of what cancels in dy - sum(dy y)
    assert error <= 2 * allowed + eps
    assert y.tobytes() == y_in_place.tobytes()
    assert dx.tobytes() == dx_in_place.tobytes()


def small(machine: Machine) -> None:
    for dtype in DTYPES:
        check(machine, dtype, 3, 33, 0)
        check(machine, dtype, 3, 33, 7)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "teams", lambda *_: ("block", (2,), (64,)))  # fewer than rows
            check(machine, dtype, 3, 203, 0)
            check(machine, dtype, 3, 203, 5)


def test_small(machine):
    small(machine)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_formula(one, dtype, shape):
    check(one, dtype, *shape)


@pytest.mark.parametrize("shift", [1e4, -1e4])  # exp of either would overflow or vanish
def test_large_numbers(one, dtype, shift):
    check(one, dtype, 5, 40, 0, shift)


def test_more_rows_than_warps(machine):
    ops = machine.ops(np.float32)
    ops.device = replace(ops.device, multiprocessors=1)
    x = normal(np.float32, 200, 3)
    y = machine.array(x)
    ops.softmax(y, y)
    assert np.allclose(machine.host(y), formula(wide(x)), rtol=1e-6)


@pytest.mark.parametrize("width", [4, 2000])
def test_minus_infinity_gets_nothing(machine, dtype, width):
    x = np.full((1, width), -np.inf, DTYPES[dtype])
    x[0, 1::2] = 0
    y = machine.array(x)
    machine.ops(DTYPES[dtype]).softmax(y, y)
    assert (wide(machine.host(y))[0, ::2] == 0).all()
    assert np.allclose(wide(machine.host(y))[0, 1::2], 2 / width, rtol=2**-8)


def test_wrong_arguments_are_named(machine):
    ops, x = machine.ops(np.float32), machine.blank((4, 8), np.float32)
    with pytest.raises(ValueError, match=r"softmax: y: got float32 \(3, 8\), wanted .* \(4, 8\)"):
        ops.softmax(x[:3], x)
    with pytest.raises(ValueError, match=r"backward: dy: got strides .* rows of neighbours"):
        ops.softmax_backward(x[:, :4], x[:, ::2], x[:, :4])


def test_a_row_of_the_lowest_numbers(machine, dtype):
    x = np.full((2, 5), ml_dtypes.finfo(DTYPES[dtype]).min, DTYPES[dtype])
    y = machine.blank(x.shape, x.dtype)
    machine.ops(x.dtype).softmax(y, machine.array(x))
    assert np.allclose(wide(machine.host(y)), 0.2, rtol=4e-3)
