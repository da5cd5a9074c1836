"""Softmax and cross-entropy in one, on the CPU.

    loss = log(sum(exp(z))) - z[target]        dz = scale (exp(z) / sum(exp(z)) - onehot(target))

logits z, dlogits dz (N, V); losses (N,); targets (N,) int32, -1: ignored, loss and gradient zero,
and the logits of such a row are not looked at. Row after row: the largest, then exp and its sum,
then for the gradient one more pass; a row is in L1 after the first. The forward writes no exp. The
logs of as many rows as a vector has lanes are taken together.
"""

from __future__ import annotations

from typing import Any

from ...types import Array
from ..reference.context import Context
from .compile import compiled
from .rows import exp_row, fill_row, scaled_exp_row, sum_of
from .vector import at, lanes, splat, store_some, vlog, with_lane


@compiled
def cross_entropy_rows(losses: Any, logits: Any, targets: Any, rows: Any, vocab: Any) -> None:
    """The rows of `cross_entropy`; targets is an array, the others are places."""
    for start in range(0, rows, lanes(losses)):
        count = min(lanes(losses), rows - start)
        sums, gaps = splat(losses, 1), splat(losses, 0)
        for i in range(count):
            target = targets[start + i]
            if target >= 0:
                row = at(logits, (start + i) * vocab)
                largest, total = exp_row(row, row, vocab, False)
                sums, gaps = with_lane(sums, i, total), with_lane(gaps, i, largest - row[target])
        store_some(losses, start, vlog(sums) + gaps, count)


@compiled
def cross_entropy_backward_rows(
    dlogits: Any, losses: Any, logits: Any, targets: Any, scale: Any, rows: Any, vocab: Any
) -> None:
    """The rows of `cross_entropy_backward`; targets is an array, the others are places."""
    for start in range(0, rows, lanes(losses)):
        count = min(lanes(losses), rows - start)
        sums, gaps = splat(losses, 1), splat(losses, 0)
        for i in range(count):
            target, row = targets[start + i], (start + i) * vocab
            out, z = at(dlogits, row), at(logits, row)
            if target < 0:
                fill_row(out, 0, vocab)
                continue
            largest, total = exp_row(z, z, vocab, False)
            sums, gaps = with_lane(sums, i, total), with_lane(gaps, i, largest - z[target])
            scaled_exp_row(out, z, largest, scale / total, vocab)
            out[target] -= scale
        store_some(losses, start, vlog(sums) + gaps, count)


@compiled
def _cross_entropy(losses: Any, logits: Any, targets: Any) -> None:
    cross_entropy_rows(at(losses, 0), at(logits, 0), targets, *logits.shape)


@compiled
def _cross_entropy_backward(
    dlogits: Any, losses: Any, logits: Any, targets: Any, scale: Any
) -> None:
    cross_entropy_backward_rows(
        at(dlogits, 0), at(losses, 0), at(logits, 0), targets, scale, *logits.shape
    )


@compiled
def _add_losses(total: Any, losses: Any) -> None:
    total[0] += sum_of(at(losses, 0), losses.size)


def cross_entropy(self: Context, losses: Array, logits: Array, targets: Array) -> None:
    """Each row's loss in nats; zero where the target is -1 (ignored)."""
    _cross_entropy(losses, logits, targets)


def cross_entropy_backward(
    self: Context, dlogits: Array, losses: Array, logits: Array, targets: Array, scale: Any
) -> None:
    """dlogits = scale (softmax(logits) - onehot(target)); the losses come with it.

    The gradient is derived in reference/cross_entropy.py.
    """
    _cross_entropy_backward(dlogits, losses, logits, targets, scale)


def add_losses(self: Context, total: Array, losses: Array) -> None:
    """total += sum(losses), in float64."""
    _add_losses(total, losses)
