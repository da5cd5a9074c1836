from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from gpu_microgpt.data.batch import Layout
from tests.gradcheck import check_gradients
from tests.op_cases import assert_close, blank, normal, planned_ops, twice

pytestmark = pytest.mark.usefixtures("implementation")

# lengths, heads, width of a head: one position; odd sizes; around the edges of tiles of 48 and 64;
# more sequences, and more heads, than are worked on at a time
SHAPES = [
    ([1], 1, 1),
    ([1, 1, 1], 3, 5),
    ([1, 2, 2, 7, 31, 33], 3, 4),
    *(([length], 3, 5) for length in (63, 64, 65, 127, 128, 129)),
    ([63, 64, 64, 65, 128, 129], 1, 8),
    ([300], 1, 128),
    ([1, 17, 33, 49, 256], 4, 32),
    ([47, 48, 97], 2, 33),
    ([96, 113], 6, 64),
    ([129] * 23, 3, 4),
    ([3, 129], 40, 2),
    ([9, 2, 64, 2], 2, 3),  # not sorted
]
IDS = [f"{'-'.join(map(str, s[0][:4]))} H{s[1]} D{s[2]}" for s in SHAPES]
shapes = pytest.mark.parametrize(("lengths", "heads", "width"), SHAPES, ids=IDS)


def operations(dtype, lengths, heads, width):
    """Operations, layout, and a batch's qkv."""
    rows, channels = sum(lengths), heads * width
    ops = planned_ops(dtype, rows, channels=channels, heads=heads, block_size=max(lengths))
    return ops, Layout.of(np.array(lengths)), normal(dtype, rows, 3 * channels)


def by_head(x: np.ndarray, rows: slice, heads: int, parts: int) -> np.ndarray:
    """Rows of x as (parts, H, T, D) in float64."""
    split = x[rows].astype(np.float64).reshape(rows.stop - rows.start, parts, heads, -1)
    return split.transpose(1, 2, 0, 3)


def probabilities(q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The whole causal (T, T) matrix of one head, and the log of each row's sum."""
    scores = q @ k.T / np.sqrt(q.shape[1])
    scores[np.triu_indices(len(q), 1)] = -np.inf
    largest = scores.max(1, keepdims=True)
    lse = np.log(np.exp(scores - largest).sum(1, keepdims=True)) + largest
    return np.exp(scores - lse), lse[:, 0]


def reference(qkv, layout, heads):
    """y (N, C) and lse (N, H), one sequence and head after another."""
    y, lse = np.zeros((len(qkv), qkv.shape[1] // 3)), np.zeros((len(qkv), heads))
    width = y.shape[1] // heads
    for start, stop in pairwise(layout.offsets.tolist()):
        q, k, v = by_head(qkv, slice(start, stop), heads, 3)
        for h in range(heads):
            p, lse[start:stop, h] = probabilities(q[h], k[h])
            y[start:stop, h * width : (h + 1) * width] = p @ v[h]
    return y, lse


def reference_backward(dy, qkv, layout, heads):
    """dqkv (N, 3C) through the whole matrix of probabilities."""
    dqkv = np.zeros(qkv.shape).reshape(len(qkv), 3, heads, -1)
    for start, stop in pairwise(layout.offsets.tolist()):
        rows = slice(start, stop)
        (q, k, v), (dy_rows,) = by_head(qkv, rows, heads, 3), by_head(dy, rows, heads, 1)
        for h in range(heads):
            p, _ = probabilities(q[h], k[h])
            dp = dy_rows[h] @ v[h].T
            ds = p * (dp - (p * dp).sum(1, keepdims=True)) / np.sqrt(q.shape[2])
            dqkv[rows, 0, h], dqkv[rows, 1, h] = ds @ k[h], ds.T @ q[h]
            dqkv[rows, 2, h] = p.T @ dy_rows[h]
    return dqkv.reshape(qkv.shape)


@shapes
def test_forward_is_the_whole_matrix(dtype, lengths, heads, width):
    ops, layout, qkv = operations(dtype, lengths, heads, width)

    def run():
        y, lse = blank(dtype, len(qkv), heads * width), blank(dtype, len(qkv), heads)
        ops.attention(y, lse, qkv, layout, heads)
        return y, lse

    y, lse = twice(run)
    expected_y, expected_lse = reference(qkv, layout, heads)
    assert_close(y, expected_y)
    assert_close(lse, expected_lse)


@shapes
def test_backward_is_the_whole_matrix(dtype, lengths, heads, width):
    ops, layout, qkv = operations(dtype, lengths, heads, width)
    dy = normal(dtype, len(qkv), heads * width, seed=1)
    y, lse = (a.astype(dtype) for a in reference(qkv, layout, heads))

    def run():
        dqkv = blank(dtype, *qkv.shape)
        ops.attention_backward(dqkv, dy, y, lse, qkv, layout, heads)
        return (dqkv,)

    (dqkv,) = twice(run)
    assert_close(dqkv, reference_backward(dy, qkv, layout, heads), 1e-5)


@pytest.mark.parametrize(
    ("lengths", "heads", "width"),
    [([1], 1, 1), ([1, 2, 2, 5], 3, 3), ([1, 65], 1, 2), ([129], 2, 2), ([17, 50], 1, 9)],
)
def test_gradients(lengths, heads, width):
    ops, layout, qkv = operations("float64", lengths, heads, width)
    dy = normal("float64", len(qkv), heads * width, seed=1)
    y, lse = blank("float64", *dy.shape), blank("float64", len(qkv), heads)

    def loss():
        ops.attention(y, lse, qkv, layout, heads)
        return float((y * dy).sum())

    loss()
    dqkv = blank("float64", *qkv.shape)
    ops.attention_backward(dqkv, dy, y, lse, qkv, layout, heads)
    # each alone: the size of one must not hide an error in another
    arrays = dict(zip("qkv", np.split(qkv, 3, axis=1), strict=True))
    gradients = dict(zip("qkv", np.split(dqkv, 3, axis=1), strict=True))
    check_gradients(loss, arrays, gradients, rtol=1e-8)


@pytest.mark.parametrize("length", [17, 49, 63, 64, 65, 129])
def test_a_position_sees_itself_and_none_after(dtype, length):
    ops, layout, qkv = operations(dtype, [length, length], 2, 4)
    outputs = []
    at = length - 2
    for change in (0, 5):
        changed = qkv.copy()
        changed[at] += change
        y, lse = blank(dtype, len(qkv), 8), blank(dtype, len(qkv), 2)
        ops.attention(y, lse, changed, layout, 2)
        outputs.append((y, lse))
    for before, after in zip(*outputs, strict=True):
        moved = np.flatnonzero((before != after).any(1))
        assert moved.tolist() == [at, at + 1]


def test_large_scores_do_not_overflow(dtype):
    ops, layout, qkv = operations(dtype, [70, 70], 2, 4)
    qkv *= 30
    y, lse = blank(dtype, 140, 8), blank(dtype, 140, 2)
    ops.attention(y, lse, qkv, layout, 2)
    expected_y, expected_lse = reference(qkv, layout, 2)
    assert np.abs(expected_lse).max() > 1000  # exp of it is infinite, even in float64
    assert_close(lse, expected_lse)
    assert_close(y, expected_y, 1e-3)  # p = exp(score - lse): the error is that of the scores
