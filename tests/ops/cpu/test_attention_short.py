"""Attention of short sequences with small heads: where it begins and ends, beside the reference."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.dims import Dims
from tests.gradcheck import check_gradients
from tests.op_cases import NAMES

pytest.importorskip("numba", reason="the compiled operations need Numba")

from gpu_microgpt.ops.cpu.attention import attention_scratch
from gpu_microgpt.ops.cpu.attention_short import LARGEST, LONGEST, is_short
from gpu_microgpt.ops.cpu.code import VECTOR_BYTES
from tests.ops.cpu.test_attention import assert_same, at_the_edge, both_ways, inputs

LENGTHS = [1, 2, 15, 16, 17]


def lanes(dtype):
    return VECTOR_BYTES // np.dtype(dtype).itemsize


def heads_of(dtype, width, vectors=1):
    return max(1, lanes(dtype) * vectors // width)


def operations(dtype, dy, heads, lengths):
    return at_the_edge(dtype, attention_scratch(dy.shape[1], heads, max(lengths)))


def short(dtype, rows, heads, width):
    return bool(is_short(np.empty(0, dtype), rows, heads * width, heads))


def test_the_rule(dtype):
    count = lanes(dtype)
    for width in (1, 2, 4, 8, 16, 32):
        heads = heads_of(dtype, width)
        longest = min(LONGEST, LARGEST // width) if width <= count else 0
        assert [short(dtype, rows, heads, width) for rows in (longest, longest + 1)] == [
            longest > 0, False,
        ]  # fmt: skip
    assert short(dtype, 2, 3 * count, 1)
    assert not short(dtype, 2, count + 1, 1)  # rows are no whole vectors
    assert not short(dtype, 2, count, 3)


@pytest.mark.parametrize("vectors", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_it_is_the_references_and_stays_inside(dtype, width, vectors):
    heads = heads_of(dtype, width, vectors)
    lengths = [*LENGTHS, LARGEST // width, LARGEST // width + 1, LONGEST, LONGEST + 1]
    for chosen in (*([n] for n in lengths), lengths):
        dy, qkv, layout = inputs(dtype, chosen, heads, width)
        backend = NumpyBackend(NAMES[dtype])
        dims = Dims(1, heads, heads * width, max(chosen), 3)
        reference = backend.ops(np.empty(backend.workspace_bytes(dims, len(dy)), np.uint8))
        ops = operations(dtype, dy, heads, chosen)
        got, again = (both_ways(ops, dy, qkv, layout, heads) for _ in range(2))
        expected = both_ways(reference, dy, qkv, layout, heads)
        for one, other, right in zip(got, again, expected, strict=True):
            assert_same(one, right)
            assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_sequence_does_not_depend_on_its_neighbours(dtype, width):
    heads, lengths = heads_of(dtype, width, 2), [3, 16, 1, 40]
    dy, qkv, layout = inputs(dtype, lengths, heads, width)
    ops = operations(dtype, dy, heads, lengths)
    whole = both_ways(ops, dy, qkv, layout, heads)
    for start, stop in zip(layout.offsets, layout.offsets[1:], strict=False):
        beside = [np.full_like(x, np.nan) for x in (dy, qkv)]
        for x, values in zip(beside, (dy, qkv), strict=True):
            x[start:stop] = values[start:stop]
        for nan, every in zip(both_ways(ops, *beside, layout, heads), whole, strict=True):
            assert nan[start:stop].tobytes() == every[start:stop].tobytes()
            assert np.isnan(nan[:start]).all()
            assert np.isnan(nan[stop:]).all()


@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_goes_where_it_must(dtype, part):
    width = min(4, lanes(dtype))
    heads = heads_of(dtype, width)
    dy, qkv, layout = inputs(dtype, [6], heads, width)
    ops = operations(dtype, dy, heads, [6])
    before = both_ways(ops, dy, qkv, layout, heads)
    channels = heads * width
    qkv[3, part * channels : (part + 1) * channels] = np.nan
    y, lse, _ = both_ways(ops, dy, qkv, layout, heads)
    struck = slice(3, 4) if part == 0 else slice(3, None)
    rest = np.ones(6, bool)
    rest[struck] = False
    assert np.isnan(y[struck]).all()
    assert np.isnan(lse[struck]).all() == (part < 2)
    for got, was in zip((y, lse), before, strict=False):
        assert got[rest].tobytes() == was[rest].tobytes()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_large_scores_do_not_overflow(dtype, width):
    heads = heads_of(dtype, width)
    dy, qkv, layout = inputs(dtype, [9, 16], heads, width)
    qkv *= 40
    got = both_ways(operations(dtype, dy, heads, [9, 16]), dy, qkv, layout, heads)
    backend = NumpyBackend(NAMES[dtype])
    dims = Dims(1, heads, heads * width, 16, 3)
    reference = backend.ops(np.empty(backend.workspace_bytes(dims, len(dy)), np.uint8))
    y, lse, _ = both_ways(reference, dy, qkv, layout, heads)
    assert np.abs(lse).max() > 1000
    assert np.abs(got[0] - y).max() <= 1e-3 * np.abs(y).max()
    assert_same(got[1], lse)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_gradients(width):
    if width > lanes(np.float64):
        pytest.skip("a head does not fit in a vector")
    heads, lengths = heads_of(np.float64, width, 2), [1, 2, 5]
    dy, qkv, layout = inputs(np.float64, lengths, heads, width)
    assert short(np.float64, 5, heads, width)
    ops = operations(np.float64, dy, heads, lengths)
    _, _, dqkv = both_ways(ops, dy, qkv, layout, heads)

    def loss():
        y, lse = np.empty_like(dy), np.empty((len(dy), heads))
        ops.attention(y, lse, qkv, layout, heads)
        return float((y * dy).sum())

    arrays = dict(zip("qkv", np.split(qkv, 3, axis=1), strict=True))
    gradients = dict(zip("qkv", np.split(dqkv, 3, axis=1), strict=True))
    check_gradients(loss, arrays, gradients, rtol=1e-8)
