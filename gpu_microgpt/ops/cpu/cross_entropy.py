"""Softmax and cross-entropy in one, on the CPU.

    loss = log(sum(exp(z))) - z[target]        dz = scale (exp(z) / sum(exp(z)) - onehot(target))

logits z, dlogits dz (N, V); losses (N,); targets (N,) int32, -1: ignored, loss and gradient zero,
and the logits of such a row are not looked at. Some rows at a time: the largest of each, then each
sum of exp, then for the gradient one more pass with exp computed again. So the rows, whose sums
along vectors are long chains, do not wait for each other, and one log does for all of them; they
are as many as a vector has lanes, if they stay in L1 meanwhile. No exp is kept in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...types import Array
from .compile import compiled
from .instructions import ADD_LOSSES, CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD, Instructions
from .rows import exp_sum, fill_row, largest_of, scaled_exp_row
from .vector import at, lane_of, lanes, splat, store_some, vlog, with_lane

TOGETHER = 8192  # logits of rows that are looked at together


@compiled
def _group(losses: Any, vocab: Any) -> Any:
    """Rows at a time."""
    return max(1, min(lanes(losses), TOGETHER // vocab))


@compiled
def _statistics(logits: Any, targets: Any, start: Any, count: Any, vocab: Any) -> Any:
    """Of `count` rows from `start` on, a lane each: the largest, the sum of exp, and how far below
    the largest the target is; 0, 1 and 0 where it is ignored."""
    tops, sums, gaps = splat(logits, 0), splat(logits, 1), splat(logits, 0)
    for i in range(count):
        row, target = at(logits, (start + i) * vocab), targets[start + i]
        if target >= 0:
            largest = largest_of(row, vocab)
            tops, gaps = with_lane(tops, i, largest), with_lane(gaps, i, largest - row[target])
    for i in range(count):
        if targets[start + i] >= 0:
            row = at(logits, (start + i) * vocab)
            sums = with_lane(sums, i, exp_sum(row, lane_of(tops, i), vocab))
    return tops, sums, gaps


@compiled
def cross_entropy_rows(losses: Any, logits: Any, targets: Any, rows: Any, vocab: Any) -> None:
    """The rows of `cross_entropy`; targets is an array, the others are places."""
    step = _group(losses, vocab)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        _, sums, gaps = _statistics(logits, targets, start, count, vocab)
        store_some(losses, start, vlog(sums) + gaps, count)


@compiled
def cross_entropy_backward_rows(
    dlogits: Any, losses: Any, logits: Any, targets: Any, scale: Any, rows: Any, vocab: Any
) -> None:
    """The rows of `cross_entropy_backward`; targets is an array, the others are places."""
    step = _group(losses, vocab)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        tops, sums, gaps = _statistics(logits, targets, start, count, vocab)
        factors = splat(sums, scale) / sums
        for i in range(count):
            row, target = (start + i) * vocab, targets[start + i]
            out = at(dlogits, row)
            if target < 0:
                fill_row(out, 0, vocab)
                continue
            scaled_exp_row(out, at(logits, row), lane_of(tops, i), lane_of(factors, i), vocab)
            out[target] -= scale
        store_some(losses, start, vlog(sums) + gaps, count)


def cross_entropy(self: Instructions, losses: Array, logits: Array, targets: Array) -> None:
    """Each row's loss in nats; zero where the target is -1 (ignored)."""
    self.do(CROSS_ENTROPY, len(logits), losses, logits, targets, logits.shape[1])


def cross_entropy_backward(
    self: Instructions, dlogits: Array, losses: Array, logits: Array, targets: Array, scale: Any
) -> None:
    """dlogits = scale (softmax(logits) - onehot(target)); the losses come with it.

    scale: a number, or (1,) float64, read when it is played. The gradient is derived in
    reference/cross_entropy.py.
    """
    factor = np.atleast_1d(np.asarray(scale, np.float64))
    arrays = (dlogits, losses, logits, targets, factor)
    self.do(CROSS_ENTROPY_BACKWARD, len(logits), *arrays, logits.shape[1])


def add_losses(self: Instructions, total: Array, losses: Array) -> None:
    """total += sum(losses), in float64."""
    self.do(ADD_LOSSES, len(losses), losses, total)
