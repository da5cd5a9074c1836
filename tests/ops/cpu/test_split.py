"""Products of float32 by AMX, of three bfloat16 parts: no further from the exact product than
float32's own, wherever numbers are neither infinite nor subnormal; what they do then."""

from __future__ import annotations

import numpy as np
import pytest

from tests.bf16_cases import missing
from tests.guard_page import up_to_the_edge
from tests.op_cases import normal

if missing("AMX"):
    pytest.skip(missing("AMX"), allow_module_level=True)

from gpu_microgpt.ops import cpu
from gpu_microgpt.ops.cpu import bf16_linear
from gpu_microgpt.ops.cpu.bf16_linear import DEPTH
from gpu_microgpt.ops.cpu.instructions import SPLIT
from gpu_microgpt.ops.cpu.linear import input_gradient, multiply, weight_gradient
from gpu_microgpt.ops.cpu.split_linear import LONG, WIDE, split_scratch
from gpu_microgpt.ops.cpu.tile import ADD, KEEP, RELU, STORE

MODES = [STORE, ADD, RELU, KEEP]
# rows N, inputs C, outputs F
SHAPES = [
    (1, 1, 1), (3, 33, 66), (13, 48, 16), (17, 31, 3), (33, 5, 66), (32, DEPTH, 32),
    (33, DEPTH + 1, 65), (127, 16, 27), (130, 96, 130), (129, 3 * DEPTH, 2 * DEPTH + 7),
    (300, 7, 1000), (515, 65, 72),
]  # fmt: skip
shapes = pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)


def blank(*shape):
    return up_to_the_edge(np.full(shape, np.nan, np.float32))


def scratch(outputs, inputs):
    return [blank(*shape) for shape in split_scratch(outputs, inputs, 4)]


def case(rows, inputs, outputs, make=None):
    """x, w, dy and what modes read: rows x outputs, rows x inputs, outputs x inputs."""
    make = make or (lambda *shape, seed: normal("float32", *shape, seed=seed))
    kinds = (
        (rows, inputs), (outputs, inputs), (rows, outputs), (rows, outputs), (rows, inputs),
        (outputs, inputs),
    )  # fmt: skip
    return [up_to_the_edge(make(*shape, seed=i)) for i, shape in enumerate(kinds)]


def both(mode, arrays, add=False):
    """y, dx, dw in three parts; the same by linear.py."""
    x, w, dy, r, r_back, old = arrays
    (rows, inputs), outputs = x.shape, len(w)
    found = []
    for split in (True, False):
        y, dx = blank(rows, outputs), blank(rows, inputs)
        dw = up_to_the_edge(old) if add else blank(outputs, inputs)
        panel, block = scratch(outputs, inputs)
        sizes = (rows, outputs, inputs)
        if split:
            bf16_linear.multiply(SPLIT, mode, *sizes, y, x, w, r, panel, outputs)
            bf16_linear.input_gradient(SPLIT, mode, *sizes, dx, dy, w, r_back, panel)
            bf16_linear.weight_gradient(SPLIT, *sizes, dw, dy, x, add, panel, block)
        else:
            multiply(mode, *sizes, y, x, w, r, panel, outputs)
            input_gradient(mode, *sizes, dx, dy, w, r_back, panel)
            weight_gradient(*sizes, dw, dy, x, add, panel, block)
        found.append((y, dx, dw))
    return found


def exact(mode, arrays, add=False):
    """What `both` gives, in float64, and the sums of the terms' sizes."""
    x, w, dy, r, r_back, old = (a.astype(float) for a in arrays)
    made = []
    for a, b, old_sum, how in (
        (x, w.T, r, mode), (dy, w, r_back, mode), (dy.T, x, old, ADD if add else STORE),
    ):  # fmt: skip
        product = a @ b
        value = {
            STORE: lambda p=product: p,
            ADD: lambda p=product, o=old_sum: p + o,
            RELU: lambda p=product: np.maximum(p, 0),
            KEEP: lambda p=product, o=old_sum: np.where(o > 0, p, 0),
        }[how]()
        made.append((value, np.abs(a) @ np.abs(b) + (np.abs(old_sum) if how == ADD else 0)))
    return made


@pytest.mark.parametrize("mode", MODES)
@shapes
def test_no_further_off_than_float32(mode, rows, inputs, outputs):
    """Of each product: the largest error and the root of the mean square. Where a sum has a few
    terms, or there are a few sums, either may be the luckier: hence the half rounding more."""
    arrays = case(rows, inputs, outputs)
    add = mode == ADD
    for mine, plain, (wide, terms) in zip(
        *both(mode, arrays, add), exact(mode, arrays, add), strict=True
    ):
        errors = [np.abs(found - wide) / terms for found in (mine, plain)]
        assert errors[0].max() <= errors[1].max() + 2**-25
        roots = [np.sqrt((error**2).mean()) for error in errors]
        assert roots[0] <= roots[1] + 2**-27


def test_much_nearer_than_two_parts():
    """Where the sums are long, a third of float32's error; two parts would have a hundred times."""
    arrays = case(300, 200, 250)
    for mine, plain, (wide, terms) in zip(*both(STORE, arrays), exact(STORE, arrays), strict=True):
        roots = [np.sqrt((((found - wide) / terms) ** 2).mean()) for found in (mine, plain)]
        assert 0 < roots[0] < 0.6 * roots[1]


def test_rows_of_all_sizes():
    """Rows of x and dy, and columns of w, from 1e-15 to 1e15 beside each other."""

    def make(*shape, seed):
        draw = np.random.default_rng(seed)
        scales = 10.0 ** draw.integers(-15, 16, (shape[0], 1) if seed != 1 else (1, shape[1]))
        return (draw.standard_normal(shape) * scales).astype(np.float32)

    arrays = case(150, 140, 70, make)
    for mine, plain, (wide, terms) in zip(*both(STORE, arrays), exact(STORE, arrays), strict=True):
        errors = [np.abs(found - wide) / terms for found in (mine, plain)]
        assert errors[0].max() <= errors[1].max() + 2**-25


def test_sums_that_cancel():
    """What is left is a millionth of the terms: right to their roundings."""
    x, w, dy, r, r_back, old = case(64, 128, 64)
    x[:, 64:], w[:, 64:] = x[:, :64], -w[:, :64]
    w[:, 0] *= np.float32(1 + 2**-20)
    arrays = [x, w, dy, r, r_back, old]
    (mine, plain), (wide, terms) = (f[0] for f in both(STORE, arrays)), exact(STORE, arrays)[0]
    assert np.abs(wide).max() < 1e-5 * terms.max()
    errors = [(np.abs(found - wide) / terms).max() for found in (mine, plain)]
    assert errors[0] <= errors[1] + 2**-25


def test_small_numbers():
    """Parts and products below 2^-126 are lost: of a term, 2^-126 (|a| + |b| + 6) at most."""
    for size in (2.0**-126, 2.0**-120, 2.0**-100, 2.0**-64):

        def make(*shape, seed, size=size):
            scale = size if seed == 0 else 1 if size < 2.0**-64 else 2.0**-62
            return (normal("float64", *shape, seed=seed) * scale).astype(np.float32)

        arrays = case(40, 50, 60, make)
        x, w, *_ = (np.abs(a.astype(float)) for a in arrays)
        (y, _, _), (plain, _, _) = both(STORE, arrays)
        wide, terms = exact(STORE, arrays)[0]
        lost = 2.0**-126 * (x.sum(1)[:, None] + w.sum(1) + 6 * x.shape[1])
        assert (np.abs(y - wide) <= 2**-22 * terms + lost).all()
        assert np.isfinite(y).all()
        if size == 2.0**-100:  # nothing is lost yet
            assert (np.abs(y - wide) <= 2**-22 * terms).all()
        if size == 2.0**-126:  # this test sees the loss
            assert np.abs(y - wide).max() > 2 * np.abs(plain - wide).max()


def test_large_numbers():
    """Up to the largest float32, which is no bfloat16."""
    largest = np.finfo(np.float32).max
    arrays = case(20, 1, 40, lambda *shape, seed: np.full(shape, largest if seed == 0 else 1, "f4"))
    arrays[1][1::2] = -0.75
    (y, _, dw), _ = both(STORE, arrays)
    assert (y[:, ::2] == largest).all()
    assert (y[:, 1::2] == -0.75 * largest).all()
    assert np.isposinf(dw).all()


SPECIAL = [np.inf, -np.inf, np.nan, 0.0, -1.0, 1 + 2**-20, -3.3e38, 2**-126, 0.1, -7.0]


@pytest.mark.parametrize("inputs", [1, 40, 3 * DEPTH])
@pytest.mark.parametrize("place", [0, -1])
def test_nan_and_inf_are_float32s(inputs, place):
    """All pairs of special numbers in one term of the sum, the others being ordinary."""
    x, w, dy, *more = case(len(SPECIAL), inputs, len(SPECIAL))
    x[:, place] = w[:, place] = SPECIAL
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = x @ w.T
    (y, _, _), _ = both(STORE, [x, w, dy, *more])
    odd = ~np.isfinite(wanted)
    assert odd.any()
    np.testing.assert_array_equal(np.where(odd, y, 0), np.where(odd, wanted, 0))
    assert np.isfinite(y[~odd]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("mode", [STORE, ADD, RELU])
def test_nan_and_inf_reach_their_row_and_no_other(mode, bad):
    arrays = case(50, 40, 70)
    x, w, dy, *_ = arrays
    x[3, 11] = dy[3, 11] = bad
    w[...] = np.abs(w)
    (y, dx, dw), _ = both(mode, arrays)
    for out in (y, dx):
        assert (np.isnan(out[3]) if np.isnan(bad) else out[3] == bad).all()
        assert np.isfinite(np.delete(out, 3, 0)).all()
    strange = ~np.isfinite(dw)
    assert strange[11].all()
    assert strange[:, 11].all()
    assert not np.delete(np.delete(strange, 11, 0), 11, 1).any()


def test_the_same_bits_twice_and_whatever_the_rows_beside():
    arrays = case(200, 3 * DEPTH - 9, 90)
    found = [b"".join(a.tobytes() for a in both(KEEP, arrays)[0]) for _ in range(2)]
    assert found[0] == found[1]
    x, w, dy, r, r_back, old = arrays
    part = [np.ascontiguousarray(a[37:87]) for a in (x, dy, r, r_back)]
    for mode in MODES:
        (whole, whole_dx, _), _ = both(mode, arrays)
        (y, dx, _), _ = both(mode, [part[0], w, part[1], part[2], part[3], old])
        assert y.tobytes() == whole[37:87].tobytes()
        assert dx.tobytes() == whole_dx[37:87].tobytes()


def test_a_sum_may_be_added_to_where_it_lies():
    x, w, _, r, _, _ = case(50, 3 * DEPTH, 70)
    y = up_to_the_edge(r)
    bf16_linear.multiply(SPLIT, ADD, 50, 70, 3 * DEPTH, y, x, w, y, scratch(70, 3 * DEPTH)[0], 70)
    wide = r + x.astype(float) @ w.astype(float).T
    assert np.abs(y - wide).max() < 2**-20 * np.abs(wide).max()


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "split"),
    [
        (WIDE, WIDE, WIDE, "y dx dw"), (WIDE - 1, WIDE, WIDE, "dw"),
        (WIDE, WIDE - 1, WIDE, "y"), (WIDE, WIDE, WIDE - 1, "dx"), (WIDE, LONG - 1, WIDE, ""),
        (1, WIDE, WIDE, ""), (LONG, WIDE, WIDE, "dw"), (WIDE, LONG, WIDE, "y"),
    ],
)  # fmt: skip
def test_operations_take_it_where_it_pays(rows, inputs, outputs, split):
    """By bits: some products are linear.py's, on any CPU's tiles."""
    arrays = case(rows, inputs, outputs)
    x, w, dy, *_ = arrays
    size = sum(4 * shape[0] + 64 for shape in split_scratch(outputs, inputs, 4))
    ops = cpu.SplitOps(np, np.zeros(size, np.uint8), np.float32)
    y, dx, dw = blank(rows, outputs), blank(rows, inputs), blank(outputs, inputs)
    ops.linear(y, x, w)
    ops.linear_backward(dx, dw, dy, x, w, False)
    mine, plain = both(STORE, arrays)
    for name, got, one, other in zip(("y", "dx", "dw"), (y, dx, dw), mine, plain, strict=True):
        assert one.tobytes() != other.tobytes()
        assert got.tobytes() == (one if name in split.split() else other).tobytes()
