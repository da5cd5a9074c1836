from __future__ import annotations

import numpy as np
import pytest

from tests.gradcheck import check_gradients
from tests.op_cases import assert_close, blank, normal, planned_ops, some_targets, twice

pytestmark = pytest.mark.usefixtures("implementation")

SHAPES = [(1, 1), (1, 3), (31, 33), (130, 5000)]  # the last is cut into blocks of rows


def reference(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses and probabilities, in float64."""
    wide = logits.astype(np.float64)
    largest = wide.max(-1, keepdims=True)
    log_p = wide - largest - np.log(np.exp(wide - largest).sum(-1, keepdims=True))
    picked = log_p[np.arange(len(targets)), targets]
    return np.where(targets >= 0, -picked, 0), np.exp(log_p)


@pytest.mark.parametrize("shift", [0.0, 1000.0, -1000.0])
@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_losses_are_the_formula(dtype, rows, vocab, shift):
    ops = planned_ops(dtype, rows, vocab=vocab)
    logits = normal(dtype, rows, vocab, scale=3.0) + np.dtype(dtype).type(shift)
    targets = some_targets(rows, vocab)

    def run():
        losses = blank(dtype, rows)
        ops.cross_entropy(losses, logits, targets)
        return (losses,)

    (losses,) = twice(run)
    expected, _ = reference(logits, targets)
    size = max(np.abs(expected).max(), abs(shift))
    assert np.abs(losses - expected).max() <= size * (2e-6 if dtype == "float32" else 1e-13)
    assert (losses[targets < 0] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 1 / 96])
@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_backward_is_the_formula_in_place_too(dtype, rows, vocab, scale):
    ops = planned_ops(dtype, rows, vocab=vocab)
    logits, targets = normal(dtype, rows, vocab, scale=3.0), some_targets(rows, vocab)

    def run():
        dlogits, in_place = blank(dtype, rows, vocab), blank(dtype, rows, vocab)
        losses, again = blank(dtype, rows), blank(dtype, rows)
        in_place[...] = logits
        ops.cross_entropy_backward(dlogits, losses, logits, targets, scale)
        ops.cross_entropy_backward(in_place, again, in_place, targets, scale)
        return dlogits, in_place, losses, again

    dlogits, in_place, losses, again = twice(run)
    expected_losses, p = reference(logits, targets)
    one_hot = np.arange(vocab) == targets[:, None]
    if vocab > 1:  # over one token there is nothing to learn
        assert_close(dlogits, scale * np.where(targets[:, None] >= 0, p - one_hot, 0))
        assert_close(losses, expected_losses)
    assert (dlogits[targets < 0] == 0).all()
    assert np.array_equal(dlogits, in_place)
    assert np.array_equal(losses, again)
    forward = blank(dtype, rows)
    ops.cross_entropy(forward, logits, targets)
    assert np.array_equal(losses, forward)


def test_all_rows_ignored(dtype):
    ops = planned_ops(dtype, 4, vocab=3)
    dlogits, losses = blank(dtype, 4, 3), blank(dtype, 4)
    targets = np.full(4, -1, np.int32)
    ops.cross_entropy_backward(dlogits, losses, normal(dtype, 4, 3), targets, 1.0)
    assert not dlogits.any()
    assert not losses.any()


@pytest.mark.parametrize(("rows", "vocab"), [(1, 3), (8, 7)])
def test_gradients(rows, vocab):
    ops = planned_ops("float64", rows, vocab=vocab)
    logits, targets = normal("float64", rows, vocab), some_targets(rows, vocab)
    losses, dlogits = blank("float64", rows), blank("float64", rows, vocab)

    def loss():
        ops.cross_entropy(losses, logits, targets)
        return 0.25 * float(losses.sum())

    ops.cross_entropy_backward(dlogits, losses, logits, targets, 0.25)
    check_gradients(loss, {"logits": logits}, {"logits": dlogits})


def test_losses_are_added_up_in_float64():
    ops = planned_ops("float32", 1)
    losses = np.full(100_000, 0.1, np.float32)
    total = np.array([2.0])
    ops.add_losses(total, losses)
    assert total[0] == pytest.approx(2 + 100_000 * float(np.float32(0.1)), rel=1e-12)
