from __future__ import annotations

import numpy as np
import pytest

from tests.gradcheck import check_gradients
from tests.op_cases import assert_close, blank, normal, planned_ops, twice

pytestmark = pytest.mark.usefixtures("implementation")

# rows, channels, vocabulary, block size: one row; odd; rows cut into blocks for the look-up; both
# sides of the change from one-hot products to sorting; sorted columns cut into blocks
SHAPES = [
    (1, 1, 3, 1),
    (31, 5, 7, 33),
    (4200, 64, 27, 100),
    (700, 8, 512, 513),
    (700, 8, 513, 512),
    (9000, 33, 600, 16),
]


def ids(rows: int, vocab: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids with repeats; the first and the last of each table among them."""
    draw = np.random.default_rng(rows)
    tokens, positions = (draw.integers(0, n, rows, np.int32) for n in (vocab, block_size))
    tokens[0], positions[-1] = vocab - 1, 0
    return tokens, positions


@pytest.mark.parametrize(("rows", "channels", "vocab", "block_size"), SHAPES)
def test_forward_is_the_sum_of_two_rows(dtype, rows, channels, vocab, block_size):
    ops = planned_ops(dtype, rows, channels=channels, block_size=block_size, vocab=vocab)
    wte, wpe = normal(dtype, vocab, channels), normal(dtype, block_size, channels, seed=1)
    tokens, positions = ids(rows, vocab, block_size)

    def run():
        x = blank(dtype, rows, channels)
        ops.embedding(x, tokens, positions, wte, wpe)
        return (x,)

    (x,) = twice(run)
    expected = [wte[i] + wpe[j] for i, j in zip(tokens, positions, strict=True)]
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("rows", "channels", "vocab", "block_size"), SHAPES)
def test_backward_sums_each_ids_rows(dtype, rows, channels, vocab, block_size, add):
    ops = planned_ops(dtype, rows, channels=channels, block_size=block_size, vocab=vocab)
    dy = normal(dtype, rows, channels)
    tokens, positions = ids(rows, vocab, block_size)
    old = 3.0 if add else 0.0

    def run():
        dwte = blank(dtype, vocab, channels, fill=old if add else np.nan)
        dwpe = blank(dtype, block_size, channels, fill=old if add else np.nan)
        ops.embedding_backward(dwte, dwpe, dy, tokens, positions, add)
        return dwte, dwpe

    for dw, index in zip(twice(run), (tokens, positions), strict=True):
        expected = np.full(dw.shape, old)
        np.add.at(expected, index, dy.astype(float))
        assert_close(dw, expected)
        unseen = np.setdiff1d(np.arange(len(dw)), index)
        assert (dw[unseen] == old).all()


@pytest.mark.parametrize("vocab", [7, 600])
def test_gradients(vocab):
    rows, channels, block_size = 13, 3, 5
    ops = planned_ops("float64", rows, channels=channels, block_size=block_size, vocab=vocab)
    wte, wpe = normal("float64", vocab, channels), normal("float64", block_size, channels, seed=1)
    dy = normal("float64", rows, channels, seed=2)
    given = ids(rows, vocab, block_size)

    def loss():
        x = blank("float64", rows, channels)
        ops.embedding(x, *given, wte, wpe)
        return float((x * dy).sum())

    dwte, dwpe = blank("float64", vocab, channels), blank("float64", block_size, channels)
    ops.embedding_backward(dwte, dwpe, dy, *given, add=False)
    check_gradients(loss, {"wte": wte, "wpe": wpe}, {"wte": dwte, "wpe": dwpe})
