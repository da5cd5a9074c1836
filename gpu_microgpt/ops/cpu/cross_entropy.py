"""Softmax and cross-entropy in one, on the CPU.

    loss = log(sum(exp(z))) - z[target]        dz = scale (exp(z) / sum(exp(z)) - onehot(target))

logits z, dlogits dz (N, V); losses (N,); targets (N,) int32, -1: ignored, loss and gradient zero,
and the logits of such a row are not looked at. Row after row: the largest, then exp and its sum,
then for the gradient one more pass; a row is in L1 after the first. The forward writes no exp.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...types import Array
from .compile import compiled
from .instructions import ADD_LOSSES, CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD, Instructions
from .rows import exp_row, fill_row, scale_row
from .vector import at


@compiled
def cross_entropy_rows(losses: Any, logits: Any, targets: Any, rows: Any, vocab: Any) -> None:
    """The rows of `cross_entropy`; targets is an array, the others are places."""
    for n in range(rows):
        losses[n] = 0
        if targets[n] >= 0:
            row = at(logits, n * vocab)
            largest, total = exp_row(row, row, vocab, False)
            losses[n] = math.log(total) + largest - row[targets[n]]


@compiled
def cross_entropy_backward_rows(
    dlogits: Any, losses: Any, logits: Any, targets: Any, scale: Any, rows: Any, vocab: Any
) -> None:
    """The rows of `cross_entropy_backward`; targets is an array, the others are places."""
    for n in range(rows):
        losses[n] = 0
        row, out = at(logits, n * vocab), at(dlogits, n * vocab)
        if targets[n] < 0:
            fill_row(out, 0, vocab)
            continue
        chosen = row[targets[n]]  # before it is overwritten
        largest, total = exp_row(out, row, vocab, True)
        losses[n] = math.log(total) + largest - chosen
        scale_row(out, out, scale / total, vocab)
        out[targets[n]] -= scale


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
