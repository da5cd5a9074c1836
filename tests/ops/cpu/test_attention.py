"""Compiled attention beside the reference's, at the edge of memory, and between neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.data.batch import Layout
from gpu_microgpt.dims import Dims
from tests.guard_page import up_to_the_edge
from tests.op_cases import NAMES, normal

pytest.importorskip("numba", reason="the compiled operations need Numba")

from gpu_microgpt.arena import array_bytes
from gpu_microgpt.ops.cpu import CompiledOps
from gpu_microgpt.ops.cpu.attention import attention_scratch
from gpu_microgpt.ops.cpu.attention_decode import decode_scratch

CASES = [
    ([1], 1, 1), ([7, 1, 7], 4, 4), ([2, 16, 17], 3, 3), ([33, 9], 1, 33), ([65], 2, 8),
    ([49, 256], 4, 32), ([100], 6, 64),
]  # fmt: skip
cases = pytest.mark.parametrize(("lengths", "heads", "width"), CASES)


def at_the_edge(dtype, shapes):
    """Operations whose workspace ends with the scratch these shapes want, and memory with it."""
    size = sum(array_bytes(shape, np.dtype(dtype).itemsize) for shape in shapes)
    return CompiledOps(np, up_to_the_edge(np.full(size, 0xFF, np.uint8)), dtype)


def blank(dtype, *shape):
    return up_to_the_edge(np.full(shape, np.nan, dtype))


def both_ways(ops, dy, qkv, layout, heads):
    """y, lse and dqkv."""
    rows, channels = dy.shape
    y, lse = blank(qkv.dtype, rows, channels), blank(qkv.dtype, rows, heads)
    dqkv = blank(qkv.dtype, *qkv.shape)
    ops.attention(y, lse, qkv, layout, heads)
    ops.attention_backward(dqkv, dy, y, lse, qkv, layout, heads)
    return y, lse, dqkv


def inputs(dtype, lengths, heads, width):
    rows, channels = sum(lengths), heads * width
    qkv = up_to_the_edge(normal(dtype, rows, 3 * channels))
    return up_to_the_edge(normal(dtype, rows, channels, seed=1)), qkv, Layout.of(np.array(lengths))


def assert_same(got, expected):
    """To 1e-5 of the largest number in float32, 1e-12 in float64."""
    tolerance = 1e-5 if got.dtype == np.float32 else 1e-12
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@cases
def test_it_is_the_references_and_stays_inside(dtype, lengths, heads, width):
    dy, qkv, layout = inputs(dtype, lengths, heads, width)
    rows, channels = dy.shape
    ops = at_the_edge(dtype, attention_scratch(channels, heads, max(lengths)))
    backend = NumpyBackend(NAMES[dtype])
    dims = Dims(1, heads, channels, max(lengths), 3)
    reference = backend.ops(np.empty(backend.workspace_bytes(dims, rows), np.uint8))
    got = both_ways(ops, dy, qkv, layout, heads)
    again = both_ways(ops, dy, qkv, layout, heads)
    for one, other, expected in zip(
        got, again, both_ways(reference, dy, qkv, layout, heads), strict=True
    ):
        assert_same(one, expected)
        assert one.tobytes() == other.tobytes()


def test_a_sequence_does_not_depend_on_its_neighbours(dtype):
    lengths, heads, width = [5, 16, 50, 3], 2, 3
    dy, qkv, layout = inputs(dtype, lengths, heads, width)
    ops = at_the_edge(dtype, attention_scratch(dy.shape[1], heads, max(lengths)))
    whole = both_ways(ops, dy, qkv, layout, heads)
    for sequence, length in enumerate(lengths):
        rows = slice(layout.offsets[sequence], layout.offsets[sequence + 1])
        alone = both_ways(ops, dy[rows].copy(), qkv[rows].copy(), Layout.of(np.array([length])), 2)
        beside = [np.full_like(x, np.nan) for x in (dy, qkv)]
        for x, values in zip(beside, (dy, qkv), strict=True):
            x[rows] = values[rows]
        among_nan = both_ways(ops, *beside, layout, heads)
        for one, nan, every in zip(alone, among_nan, whole, strict=True):
            assert one.tobytes() == every[rows].tobytes() == nan[rows].tobytes()


@pytest.mark.parametrize(
    ("lengths", "heads", "width"), [([0], 1, 1), ([6], 3, 5), ([32, 4], 2, 32)]
)
def test_decoding_stays_inside(dtype, lengths, heads, width):
    size, block_size = len(lengths), max(lengths) + 1
    ops = at_the_edge(dtype, decode_scratch(block_size))
    qkv = up_to_the_edge(normal(dtype, size, 3 * heads * width))
    shape = (size, heads, block_size, width)
    keys, values = (up_to_the_edge(normal(dtype, *shape, seed=s)) for s in (1, 2))
    at = np.array(lengths, np.int32)
    ops.cache_kv(keys, values, qkv, np.arange(size, dtype=np.int32), at)
    y = blank(dtype, size, heads * width)
    ops.attention_decode(y, qkv, keys, values, at)
    q = qkv.reshape(size, 3, heads, 1, width)[:, 0]
    for s, length in enumerate(lengths):
        scores = (q[s] @ keys[s, :, : length + 1].swapaxes(1, 2)) * width**-0.5
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        assert_same(y[s], (p @ values[s, :, : length + 1]).reshape(-1))
