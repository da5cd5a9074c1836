"""Softmax and cross-entropy in one: loss = log(sum(exp(logits))) - logits[target]."""

from __future__ import annotations

from typing import Any

from ...types import Array
from .context import Context, block_rows


def cross_entropy(self: Context, losses: Array, logits: Array, targets: Array) -> None:
    """Each row's loss in nats; zero where the target is -1 (ignored)."""
    for rows in self.blocks(*logits.shape):
        exps, largest, total = _scratch(self, logits[rows])
        _shifted_exp(self, exps, largest, total, logits[rows])
        _losses(self, losses[rows], largest, total, logits[rows], targets[rows])


def cross_entropy_backward(
    self: Context, dlogits: Array, losses: Array, logits: Array, targets: Array, scale: Any
) -> None:
    """dlogits = scale (softmax(logits) - onehot(target)); the losses come with it.

    With p = softmax(z): loss = log(sum_j exp(z_j)) - z_t, so dloss/dz_i = p_i - [i = t].
    """
    xp = self.xp
    for rows in self.blocks(*logits.shape):
        exps, largest, total = _scratch(self, logits[rows])
        _shifted_exp(self, exps, largest, total, logits[rows])
        _losses(self, losses[rows], largest, total, logits[rows], targets[rows])
        scored = targets[rows] >= 0
        xp.divide(scale, total, out=total)
        total *= scored
        xp.multiply(exps, total[:, None], out=dlogits[rows])
        hit = xp.flatnonzero(scored)
        dlogits[rows][hit, targets[rows][hit]] -= scale


def add_losses(self: Context, total: Array, losses: Array) -> None:
    """total += sum(losses), in float64."""
    total += self.xp.sum(losses, dtype=self.xp.float64)


def _scratch(self: Context, logits: Array) -> tuple[Array, ...]:
    return self.scratch(logits.dtype, logits.shape, logits.shape[:1], logits.shape[:1])


def _shifted_exp(self: Context, exps: Array, largest: Array, total: Array, logits: Array) -> None:
    """exps = exp(logits - largest), and its sum a row."""
    xp = self.xp
    xp.max(logits, axis=-1, out=largest)
    xp.subtract(logits, largest[:, None], out=exps)
    xp.exp(exps, out=exps)
    xp.sum(exps, axis=-1, out=total)


def _losses(
    self: Context, losses: Array, largest: Array, total: Array, logits: Array, targets: Array
) -> None:
    """losses = log(total) + largest - logits[target], zero where ignored."""
    xp = self.xp
    xp.log(total, out=losses)
    losses += largest
    losses -= logits[xp.arange(len(targets)), targets]  # -1 picks some finite number ...
    losses *= targets >= 0  # ... which is dropped here


def cross_entropy_scratch(rows: int, vocab: int) -> tuple[tuple[int, ...], ...]:
    """Scratch shapes at most wanted here."""
    rows = block_rows(rows, vocab)
    return ((rows, vocab), (rows,), (rows,))
