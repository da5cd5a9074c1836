"""Launchers of kernels/cross_entropy.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...types import Array
from .arrays import row_stride
from .context import NULL, WARP, Context, ceil_div, rows_of
from .softmax import in_packs, teams

LOSS_BLOCK = 1024
STATIC_SHARED = 128  # bytes of a block, beside the row it keeps
NUMBER = 4  # bytes of a loss and of a target, which may start at any of them


def cross_entropy(self: Context, losses: Array, logits: Array, targets: Array) -> None:
    """losses = log(sum(exp(logits))) - logits[target], 0 where the target is -1."""
    rows, vocab = rows_of("cross_entropy", "logits", logits)
    _check(self, "cross_entropy", losses, targets, logits=logits)
    team, grid, block = teams(self, rows, vocab)
    kernel = self.kernel("cross_entropy", f"cross_entropy_{team}")
    sizes = (np.int32(rows), np.int32(vocab), np.int64(row_stride(logits)))
    kernel(grid, block, (losses, logits, targets, *sizes, np.int32(in_packs(self, logits))))


def cross_entropy_backward(
    self: Context, dlogits: Array, losses: Array, logits: Array, targets: Array, scale: Any
) -> None:
    """dlogits = scale (softmax(logits) - onehot(targets)), and the losses with it.

    scale: a number, or a (1,) float32 array. Where rows of dlogits lie apart, what is between them
    and behind the last becomes 0, so that it may enter a matrix product.
    """
    rows, vocab = rows_of("cross_entropy_backward", "logits", logits)
    _check(self, "cross_entropy_backward", losses, targets, dlogits=dlogits, logits=logits)
    factor, number = NULL, np.float32(1)
    if isinstance(scale, (int, float, np.number)):
        number = np.float32(scale)
    else:
        factor = scale
        self.check("cross_entropy_backward", NUMBER, scale=(scale, "float32", (1,)))
    team, grid, block = teams(self, rows, vocab)
    vector, shared = in_packs(self, dlogits, logits), ceil_div(vocab, self.pack) * 16
    strides = np.int64(row_stride(dlogits)), np.int64(row_stride(logits))
    args = (_with_padding(dlogits), losses, logits, targets, factor)
    numbers = (np.int32(rows), np.int32(vocab), *strides, number)
    if team == "block" and vector and shared + STATIC_SHARED <= self.device.shared_per_block:
        kernel = self.kernel("cross_entropy", "cross_entropy_backward_shared", shared)
        block = (_threads(self, vocab, shared),)
        kernel(grid, block, (*args, *numbers), shared_mem=shared)
    else:
        kernel = self.kernel("cross_entropy", f"cross_entropy_backward_{team}")
        kernel(grid, block, (*args, *numbers, np.int32(vector)))


def add_losses(self: Context, total: Array, losses: Array) -> None:
    """total += sum(losses)."""
    self.check("add_losses", total.itemsize, total=(total, "float64", (1,)))
    self.check("add_losses", losses=(losses, "float32", losses.shape[:1]))
    kernel = self.kernel("cross_entropy", "add_losses")
    kernel((1,), (LOSS_BLOCK,), (total, losses, np.int64(losses.size)))


def _check(self: Context, op: str, losses: Array, targets: Array, **logits: Array) -> None:
    shape = logits["logits"].shape
    self.check_rows(op, **{name: (a, self.real, shape) for name, a in logits.items()})
    self.check(
        op, NUMBER, losses=(losses, "float32", shape[:1]), targets=(targets, "int32", shape[:1])
    )


def _threads(self: Context, vocab: int, shared: int) -> int:
    """Of a block that keeps its row: four packs or more for each, as many are loaded at once;
    many of them where no second block fits beside it, to be at work while one loads."""
    alone = 2 * (shared + STATIC_SHARED + self.device.reserved_shared)
    most = 1024 if alone > self.device.shared_per_multiprocessor else 512
    return max(128, min(most, ceil_div(vocab, 4 * self.pack * WARP) * WARP))


def _with_padding(rows: Array) -> Array:
    """The same memory, with all that the kernel may write."""
    if isinstance(rows, np.ndarray):  # the emulator guards what lies outside an array
        return np.lib.stride_tricks.as_strided(rows, (len(rows), row_stride(rows)))
    return rows
