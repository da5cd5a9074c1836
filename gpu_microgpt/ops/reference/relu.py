"""Rectified linear unit: y = max(x, 0)."""

from __future__ import annotations

from ...types import Array
from .context import Context, block_rows


def relu(self: Context, y: Array, x: Array) -> None:
    """y = max(x, 0)."""
    self.xp.maximum(x, 0, out=y)


def relu_backward(self: Context, dx: Array, dy: Array, y: Array) -> None:
    """dx = dy where y > 0, else 0: the slope is 1 where x > 0, which is where y > 0."""
    for rows in self.blocks(*y.shape):
        (passed,) = self.scratch(bool, y[rows].shape)
        self.xp.greater(y[rows], 0, out=passed)
        self.xp.multiply(dy[rows], passed, out=dx[rows])


def relu_scratch(rows: int, width: int) -> tuple[tuple[int, ...], ...]:
    """Scratch shapes at most wanted here (one byte an element)."""
    return ((block_rows(rows, width), width),)
