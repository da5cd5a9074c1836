from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.machine import DTYPES, Machine, normal, twice, wide

SIZES = [(1, 1), (1, 7), (31, 33), (5, 4096)]


def check(machine: Machine, name: str, rows: int, width: int) -> None:
    """Both directions are the reference's, bit for bit."""
    dtype = DTYPES[name]
    x, dy = normal(dtype, rows, width), normal(dtype, rows, width, seed=1)
    ops = machine.ops(dtype)

    def run():
        y, dx = machine.blank(x.shape, dtype), machine.blank(x.shape, dtype)
        ops.relu(y, machine.array(x))
        ops.relu_backward(dx, machine.array(dy), y)
        return y, dx

    y, dx = twice(machine, run)
    assert np.array_equal(y, np.maximum(x, 0))
    assert np.array_equal(dx, np.where(x > 0, dy, 0))


def small(machine: Machine) -> None:
    for name in DTYPES:
        check(machine, name, 31, 67)


def test_small(machine):
    small(machine)


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_equals_the_reference(machine, dtype, rows, width):
    check(machine, dtype, rows, width)


def test_in_place(machine, dtype):
    x, dy = normal(DTYPES[dtype], 3, 37), normal(DTYPES[dtype], 3, 37, seed=1)
    y, dx = machine.array(x), machine.array(dy)
    ops = machine.ops(DTYPES[dtype])
    ops.relu(y, y)
    ops.relu_backward(dx, dx, y)
    assert np.array_equal(machine.host(y), np.maximum(x, 0))
    assert np.array_equal(machine.host(dx), np.where(x > 0, dy, 0))


def test_wrong_arguments_are_named(machine):
    ops, x = machine.ops(np.float32), machine.blank((4, 8), np.float32)
    with pytest.raises(ValueError, match=r"relu: y: got float32 \(3, 8\), wanted float32 \(4, 8\)"):
        ops.relu(x[:3], x)
    with pytest.raises(ValueError, match=r"relu: y: got float64 \(4, 8\), wanted float32"):
        ops.relu(x.astype(np.float64), x)
    with pytest.raises(ValueError, match=r"relu: y: got strides .* wanted a contiguous array"):
        ops.relu(x.T, machine.blank((8, 4), np.float32))
    with pytest.raises(ValueError, match="wanted a multiple of 16"):
        ops.relu(x.reshape(-1)[1:9], x.reshape(-1)[1:9])


def test_nan_stays_nan(machine, dtype):
    x = normal(DTYPES[dtype], 3, 7)
    x[1, 2] = x[2, 6] = np.nan  # in a pack and behind the last
    y = machine.blank(x.shape, x.dtype)
    machine.ops(x.dtype).relu(y, machine.array(x))
    assert np.array_equal(np.isnan(wide(machine.host(y))), np.isnan(wide(x)))


def test_arrays_of_the_host_are_refused(machine):
    x = machine.blank((4, 8), np.float32)
    with pytest.raises(ValueError, match=r"relu: y: got numpy.ndarray, wanted .*, on the device"):
        machine.ops(np.float32).relu(np.zeros((4, 8), np.float32), x)
