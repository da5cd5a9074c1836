"""Products of operands rounded to bfloat16, beside NumPy on operands rounded by ml_dtypes: every
mode, every edge, at the edge of memory, on each unit the CPU has."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from tests.bf16_cases import every_unit, missing, needs_bf16, rounded
from tests.guard_page import up_to_the_edge
from tests.op_cases import normal

if missing():
    pytest.skip(missing(), allow_module_level=True)

from gpu_microgpt.ops.cpu import bf16_linear
from gpu_microgpt.ops.cpu.bf16 import (
    SIDE,
    pack_columns,
    pack_rows,
    pack_strips,
    pack_strips_transposed,
)
from gpu_microgpt.ops.cpu.compile import compiled
from gpu_microgpt.ops.cpu.instructions import AMX, DOTS
from gpu_microgpt.ops.cpu.tile import ADD, KEEP, RELU, STORE
from gpu_microgpt.ops.cpu.vector import at

MODES = [STORE, ADD, RELU, KEEP]
# rows N, inputs C, outputs F
SHAPES = [
    (1, 1, 1), (1, 64, 27), (3, 33, 66), (12, 48, 16), (13, 48, 16), (17, 31, 3), (31, 64, 33),
    (33, 5, 66), (64, 32, 32), (127, 16, 27), (130, 96, 130), (257, 40, 64), (300, 7, 1000),
    (515, 65, 72),
]  # fmt: skip
shapes = pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)


@compiled
def packings(name, matrix, ld, count, k, parts, p, turned):
    if name == 0:
        pack_rows(at(matrix, 0), ld, count, k, parts, at(p, 0))
    elif name == 1:
        pack_columns(at(matrix, 0), ld, count, k, parts, at(p, 0), at(turned, 0))
    elif name == 2:
        pack_strips(at(matrix, 0), ld, k, count, parts, at(p, 0))
    else:
        pack_strips_transposed(at(matrix, 0), ld, k, count, parts, at(p, 0), at(turned, 0))


def packed_parts(name, numbers, parts):
    """What the words of packed rows hold, (parts, rows, words(k) * 2) uint16, in the order of k.

    numbers (rows, k); name: of `packings`. Whole blocks or strips of rows come back.
    """
    count, k = numbers.shape
    steps, sides = -(-k // SIDE), -(-count // SIDE)
    lies = up_to_the_edge(np.ascontiguousarray(numbers.T if name in (1, 2) else numbers))
    blocked = parts > 1 or name > 1
    rows = sides * SIDE if blocked else -(-count // 16) * 16 if name == 1 else count
    packed = up_to_the_edge(np.full((rows * parts * steps * 16,), np.nan, np.float32))
    packings(name, lies, lies.shape[1], count, k, parts, packed, scratch(1, 1)[0])
    if not blocked:
        words = packed.reshape(1, rows, steps, 16).swapaxes(1, 2)[:, :, None]
    elif name < 2:
        words = packed.reshape(sides, steps, parts, SIDE, 16)
    else:
        words = packed.reshape(sides, steps, parts, 16, SIDE).swapaxes(3, 4)
    pairs = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    numbers = pairs.transpose(2, 0, 3, 1, 5, 4)  # parts, sides, rows, steps, halves, words
    return numbers.reshape(parts, -1, steps * SIDE)[:, :count]


def functions(unit):
    """The products of one unit, under linear.py's names."""
    number = {"AMX": AMX, "AVX512_BF16": DOTS}[unit]
    names = ("multiply", "input_gradient", "weight_gradient", "gradients")
    return SimpleNamespace(**{n: partial(getattr(bf16_linear, n), number) for n in names})


def scratch(outputs, inputs):
    shapes = bf16_linear.bf16_scratch(outputs, inputs, 4)
    return [up_to_the_edge(np.full(shape, np.nan, np.float32)) for shape in shapes]


def blank(*shape):
    return up_to_the_edge(np.full(shape, np.nan, np.float32))


def case(rows, inputs, outputs):
    """x, w, dy and what modes read: rows x outputs, rows x inputs, outputs x inputs."""
    kinds = (
        (rows, inputs), (outputs, inputs), (rows, outputs), (rows, outputs), (rows, inputs),
        (outputs, inputs),
    )  # fmt: skip
    return [up_to_the_edge(normal("float32", *s, seed=i)) for i, s in enumerate(kinds)]


def finished(mode, product, r):
    return {
        STORE: lambda: product,
        ADD: lambda: product + r,
        RELU: lambda: np.maximum(product, 0),
        KEEP: lambda: np.where(r > 0, product, 0),
    }[mode]()


def assert_only_sums_differ(got, mode, a, b, r):
    """got is a b of rounded a, b, to as many roundings of the terms as a float32 sum has."""
    a, b = rounded(a), rounded(b)
    wide = finished(mode, a.astype(float) @ b, r)
    plain = finished(mode, a @ b, r)
    terms = np.abs(a) @ np.abs(b) + (np.abs(r) if mode == ADD else 0)
    error = np.abs(got - wide)
    assert (error <= (2 + a.shape[1] ** 0.5) * 2**-24 * terms).all()
    assert error.max() <= 2 * np.abs(plain - wide).max() + 2**-23 * terms.max()


@needs_bf16
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", range(4), ids=["rows", "columns", "strips", "strips transposed"])
@pytest.mark.parametrize(("count", "k"), [(1, 1), (5, 37), (16, 32), (33, 31), (64, 64), (48, 66)])
def test_packed_words_are_the_rounded_numbers(name, count, k, parts):
    import ml_dtypes

    numbers = normal("float32", count, k)
    numbers.flat[:: max(3, k // 2)] = 1 + 2**-8  # ties: down, ...
    numbers.flat[1 :: max(5, k // 2)] = 1 + 3 * 2**-8  # ... and up to even
    got = packed_parts(name, numbers, parts)
    assert not got[:, :, k:].any()
    if parts == 1:
        assert (got[0, :, :k] == numbers.astype(ml_dtypes.bfloat16).view(np.uint16)).all()
    else:
        first, second, third = (got[:, :, :k].astype(np.uint32) << 16).view(np.float32)
        assert (first.astype(float) + second + third == numbers).all()
        assert (np.abs(numbers - first) <= 2**-8 * np.abs(numbers)).all()
        assert (np.abs(third) <= 2**-8 * np.abs(second)).all()


@needs_bf16
def test_rounding_of_extremes():
    numbers = np.array([[np.nan, np.inf, -np.inf, -0.0, 3.4e38, -3.4e38, 1e-37, -np.nan]], "f4")
    got = (packed_parts(0, numbers, 1)[0, 0, :8].astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(got, rounded(numbers)[0])
    assert np.signbit(got[3])


@every_unit
@pytest.mark.parametrize("mode", MODES)
@shapes
def test_products(unit, mode, rows, inputs, outputs):
    x, w, dy, r, r_back, _ = case(rows, inputs, outputs)
    panel, _ = scratch(outputs, inputs)
    y, dx = blank(rows, outputs), blank(rows, inputs)
    functions(unit).multiply(mode, rows, outputs, inputs, y, x, w, r, panel, outputs)
    assert_only_sums_differ(y, mode, x, w.T, r)
    functions(unit).input_gradient(mode, rows, outputs, inputs, dx, dy, w, r_back, panel)
    assert_only_sums_differ(dx, mode, dy, w, r_back)


@every_unit
@pytest.mark.parametrize("add", [False, True])
@shapes
def test_weight_gradient(unit, add, rows, inputs, outputs):
    x, _, dy, _, _, old = case(rows, inputs, outputs)
    dw = up_to_the_edge(old) if add else blank(outputs, inputs)
    functions(unit).weight_gradient(
        rows, outputs, inputs, dw, dy, x, add, *scratch(outputs, inputs)
    )
    assert_only_sums_differ(dw, ADD if add else STORE, dy.T, x, old)


@every_unit
def test_a_sum_may_be_added_to_where_it_lies(unit):
    x, w, _, r, _, _ = case(50, 40, 70)
    y = up_to_the_edge(r)
    functions(unit).multiply(ADD, 50, 70, 40, y, x, w, y, scratch(70, 40)[0], 70)
    assert_only_sums_differ(y, ADD, x, w.T, r)


@every_unit
@pytest.mark.parametrize("rows", [5, 50])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_reach_their_row_and_no_other(unit, bad, rows):
    x, w, dy, r, r_back, _ = case(rows, 40, 70)
    x[3, 11] = dy[3, 11] = bad
    w[...] = np.abs(w)
    others = np.arange(rows) != 3
    panel, block = scratch(70, 40)
    for mode in (STORE, ADD, RELU):
        y, dx, dw = blank(rows, 70), blank(rows, 40), blank(70, 40)
        functions(unit).multiply(mode, rows, 70, 40, y, x, w, r, panel, 70)
        functions(unit).input_gradient(mode, rows, 70, 40, dx, dy, w, r_back, panel)
        for out in (y, dx):
            assert (np.isnan(out[3]) if np.isnan(bad) else out[3] == bad).all()
            assert np.isfinite(out[others]).all()
        functions(unit).weight_gradient(rows, 70, 40, dw, dy, x, False, panel, block)
        strange = ~np.isfinite(dw)
        assert strange[11].all()
        assert strange[:, 11].all()
        assert not np.delete(np.delete(strange, 11, 0), 11, 1).any()


@every_unit
def test_the_same_bits_twice(unit):
    x, w, dy, r, _, _ = case(300, 70, 90)
    found = set()
    for _ in range(2):
        y, dx, dw = blank(300, 90), blank(300, 70), blank(90, 70)
        functions(unit).multiply(ADD, 300, 90, 70, y, x, w, r, scratch(90, 70)[0], 90)
        functions(unit).gradients(KEEP, 300, 90, 70, dx, dw, dy, x, w, False, *scratch(90, 70))
        found.add(y.tobytes() + dx.tobytes() + dw.tobytes())
    assert len(found) == 1


@every_unit
def test_a_row_does_not_depend_on_the_others(unit):
    """So that a batch in pieces gives what it gives as a whole."""
    x, w, _, r, _, _ = case(200, 70, 90)
    whole, part = blank(200, 90), blank(50, 90)
    functions(unit).multiply(STORE, 200, 90, 70, whole, x, w, r, scratch(90, 70)[0], 90)
    some = np.ascontiguousarray(x[37:87])
    functions(unit).multiply(STORE, 50, 90, 70, part, some, w, r, scratch(90, 70)[0], 90)
    assert part.tobytes() == whole[37:87].tobytes()
