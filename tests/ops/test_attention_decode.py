from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.data.batch import Layout
from tests.op_cases import assert_close, blank, normal, planned_ops

pytestmark = pytest.mark.usefixtures("implementation")

SHAPES = [
    ([0], 1, 1, 1), ([0, 3, 3, 6], 3, 5, 7), ([64, 0, 128], 2, 4, 129), ([255], 4, 32, 256),
    ([16, 31], 2, 33, 40),
]  # fmt: skip
shapes = pytest.mark.parametrize(("lengths", "heads", "width", "block_size"), SHAPES)


@shapes
def test_cache_keeps_each_row_at_its_place(dtype, lengths, heads, width, block_size):
    size = len(lengths)
    ops = planned_ops(dtype, size, channels=heads * width, heads=heads, block_size=block_size)
    qkv = normal(dtype, size, 3 * heads * width)
    keys, values = (np.full((size, heads, block_size, width), np.nan, dtype) for _ in range(2))
    sequences = np.arange(size, dtype=np.int32)[::-1].copy()
    ops.cache_kv(keys, values, qkv, sequences, np.array(lengths, np.int32))
    for cache, part in ((keys, 1), (values, 2)):
        for row, (s, t) in enumerate(zip(sequences, lengths, strict=True)):
            expected = qkv[row].reshape(3, heads, width)[part]
            assert np.array_equal(cache[s, :, t], expected)
            cache[s, :, t] = np.nan
        assert np.isnan(cache).all()  # nothing else was written


@shapes
def test_decode_is_the_last_row_of_attention(dtype, lengths, heads, width, block_size):
    size, channels = len(lengths), heads * width
    full = Layout.of(np.array(lengths) + 1)
    rows = int(full.offsets[-1])
    ops = planned_ops(dtype, rows, channels=channels, heads=heads, block_size=block_size)
    qkv = normal(dtype, rows, 3 * channels)
    sequences = np.repeat(np.arange(size), np.diff(full.offsets)).astype(np.int32)
    positions = (np.arange(rows) - full.offsets[sequences]).astype(np.int32)
    # what lies beyond a sequence is some finite number: zeros at first, then what was there before
    keys, values = (normal(dtype, size, heads, block_size, width, seed=s) for s in (1, 2))
    ops.cache_kv(keys, values, qkv, sequences, positions)

    whole, lse = blank(dtype, rows, channels), blank(dtype, rows, heads)
    ops.attention(whole, lse, qkv, full, heads)
    last = full.offsets[1:] - 1
    y = blank(dtype, size, channels)
    ops.attention_decode(y, qkv[last], keys, values, np.array(lengths, np.int32))
    assert_close(y, whole[last].astype(np.float64))


def test_what_lies_beyond_a_sequence_does_not_matter(dtype):
    ops = planned_ops(dtype, 2, channels=6, heads=2, block_size=9)
    qkv = normal(dtype, 2, 18)
    keys, values = (normal(dtype, 2, 2, 9, 3, seed=s) for s in (1, 2))
    outputs = []
    for junk in (0, 1e6):
        keys[0, :, 4:], values[0, :, 4:] = junk, junk
        y = blank(dtype, 2, 6)
        ops.attention_decode(y, qkv, keys, values, np.array([3, 8], np.int32))
        outputs.append(y.tobytes())
    assert outputs[0] == outputs[1]
