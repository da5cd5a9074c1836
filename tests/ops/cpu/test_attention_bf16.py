"""Attention with bfloat16 operands beside the reference's formulas in float64, at the edge of
memory, and between neighbours; on each unit the CPU has."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.arena import array_bytes
from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.data.batch import Layout
from gpu_microgpt.dims import Dims
from tests.bf16_cases import every_unit, missing, rounded
from tests.guard_page import up_to_the_edge
from tests.op_cases import normal

if missing():
    pytest.skip(missing(), allow_module_level=True)

from gpu_microgpt.ops import cpu
from gpu_microgpt.ops.cpu.attention_bf16_backward import CHUNK

# lengths, heads, channels of a head
CASES = [
    ([1], 1, 16), ([7, 1, 31], 2, 16), ([33, 9, 64], 1, 32), ([65], 2, 48), ([49, 200], 4, 32),
    ([CHUNK], 1, 64), ([CHUNK + 1], 2, 16), ([2 * CHUNK + 45, 3], 1, 32),
]  # fmt: skip
cases = pytest.mark.parametrize(("lengths", "heads", "width"), CASES)
KINDS = {"AMX": cpu.AmxOps, "AVX512_BF16": cpu.DotOps}


def operations(unit, channels, heads, longest):
    """Their workspace ends with the scratch that is planned, and memory with it."""
    shapes = KINDS[unit].attention_scratch(channels, heads, longest)
    size = sum(array_bytes(shape, 4) for shape in shapes)
    return KINDS[unit](np, up_to_the_edge(np.full(size, 0xFF, np.uint8)), np.float32)


def inputs(lengths, heads, width):
    """Numbers that rounding leaves as they are: what differs is what attention itself rounds."""
    rows, channels = sum(lengths), heads * width
    dy, qkv = normal("float32", rows, channels, seed=1), normal("float32", rows, 3 * channels)
    return (
        up_to_the_edge(rounded(dy)), up_to_the_edge(rounded(qkv)), Layout.of(np.array(lengths))
    )  # fmt: skip


def both_ways(ops, dy, qkv, layout, heads):
    """y, lse and dqkv."""
    rows, channels = dy.shape
    y, lse, dqkv = (
        up_to_the_edge(np.full((rows, n), np.nan, qkv.dtype))
        for n in (channels, heads, 3 * channels)
    )
    ops.attention(y, lse, qkv, layout, heads)
    ops.attention_backward(dqkv, dy, y, lse, qkv, layout, heads)
    return y, lse, dqkv


def reference(dy, qkv, layout, heads, longest):
    backend = NumpyBackend("fp64")
    dims = Dims(1, heads, dy.shape[1], longest, 3)
    ops = backend.ops(np.empty(backend.workspace_bytes(dims, len(dy)), np.uint8))
    return both_ways(ops, dy.astype(float), qkv.astype(float), layout, heads)


@every_unit
@cases
def test_it_is_the_references_to_its_rounding(unit, lengths, heads, width):
    dy, qkv, layout = inputs(lengths, heads, width)
    ops = operations(unit, dy.shape[1], heads, max(lengths))
    wanted = reference(dy, qkv, layout, heads, max(lengths))
    got, again = (both_ways(ops, dy, qkv, layout, heads) for _ in range(2))
    tolerances = (2**-8, 2**-18, 2**-7)  # of the largest: p is rounded; lse is not; p and ds are
    for one, other, expected, tolerance in zip(got, again, wanted, tolerances, strict=True):
        assert np.abs(one - expected).max() <= tolerance * max(1, np.abs(expected).max())
        assert np.linalg.norm(one - expected) <= tolerance / 2 * max(1, np.linalg.norm(expected))
        assert one.tobytes() == other.tobytes()


@every_unit
def test_it_rounds(unit):
    """Else the test above says nothing of bfloat16."""
    rows, heads, layout = 40, 1, Layout.of(np.array([40]))
    dy, qkv = normal("float32", rows, 32), normal("float32", rows, 96)
    ops = operations(unit, 32, heads, rows)
    y, lse, dqkv = both_ways(ops, dy, qkv, layout, heads)
    for one, of_rounded, exact in zip(
        (y, lse, dqkv), reference(rounded(dy), rounded(qkv), layout, heads, rows),
        reference(dy, qkv, layout, heads, rows), strict=True,
    ):  # fmt: skip
        assert np.linalg.norm(one - of_rounded) < 0.9 * np.linalg.norm(one - exact)
        assert np.linalg.norm(one - exact) > 2**-14 * np.linalg.norm(exact)


@every_unit
def test_a_sequence_does_not_depend_on_its_neighbours(unit):
    lengths, heads, width = [5, 16, 50, 3], 2, 16
    dy, qkv, layout = inputs(lengths, heads, width)
    ops = operations(unit, dy.shape[1], heads, max(lengths))
    whole = both_ways(ops, dy, qkv, layout, heads)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone = both_ways(ops, dy[rows], qkv[rows], Layout.of(np.array([length])), heads)
        for one, part in zip(alone, whole, strict=True):
            assert one.tobytes() == part[rows].tobytes()
        start += length


@every_unit
def test_no_key_after_the_query_is_seen(unit):
    """Nothing changes before a row that is replaced, forward; nor after it, of its own k and v."""
    dy, qkv, layout = inputs([100], 1, 32)
    ops = operations(unit, 32, 1, 100)
    before, lse, _ = both_ways(ops, dy, qkv, layout, 1)
    qkv[57] *= -3
    after, lse_after, dqkv = both_ways(ops, dy, qkv, layout, 1)
    assert before[:57].tobytes() == after[:57].tobytes()
    assert lse[:57].tobytes() == lse_after[:57].tobytes()
    assert (np.abs(before - after)[57:].max(1) > 1e-4).all()
    dy[57:] = 0
    assert np.isfinite(dqkv).all()
    _, _, dqkv = both_ways(ops, dy, qkv, layout, 1)
    assert not dqkv[57:].any()
    assert dqkv[:57].any(1).all()


@every_unit
def test_nan_is_not_hidden(unit):
    dy, qkv, layout = inputs([40, 20], 1, 32)
    ops = operations(unit, 32, 1, 40)
    qkv[50, 3] = np.nan
    y, _, dqkv = both_ways(ops, dy, qkv, layout, 1)
    assert np.isnan(y[50]).all()
    assert np.isnan(dqkv[40:]).any()
    assert np.isfinite(y[:40]).all()
    assert np.isfinite(dqkv[:40]).all()


@every_unit
def test_heads_of_other_sizes_are_float32s(unit):
    rows, heads, layout = 20, 2, Layout.of(np.array([20]))
    dy, qkv = normal("float32", rows, 24), normal("float32", rows, 72)
    ops = operations(unit, 24, heads, rows)
    planned = cpu.workspace_bytes(Dims(1, 2, 24, 20, 3), 20, 4)
    plain = cpu.CompiledOps(np, np.empty(planned, "u1"), np.float32)
    for one, other in zip(
        both_ways(ops, dy, qkv, layout, heads), both_ways(plain, dy, qkv, layout, heads),
        strict=True,
    ):  # fmt: skip
        assert one.tobytes() == other.tobytes()
