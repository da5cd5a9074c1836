"""Softmax over the last axis: y = exp(x) / sum(exp(x))."""

from __future__ import annotations

from ...types import Array
from .context import Context, block_rows


def softmax(self: Context, y: Array, x: Array) -> None:
    """The row's largest x is subtracted first, so that exp cannot overflow."""
    xp = self.xp
    xp.subtract(x, x.max(-1, keepdims=True), out=y)
    xp.exp(y, out=y)
    y /= y.sum(-1, keepdims=True)


def softmax_backward(self: Context, dx: Array, dy: Array, y: Array) -> None:
    """dx = y (dy - sum(dy y)).

    dy_i/dx_j = y_i ([i=j] - y_j), so dL/dx_j = y_j dy_j - y_j sum_i dy_i y_i.
    """
    for rows in self.blocks(*y.shape):
        (dot,) = self.scratch(y.dtype, (rows.stop - rows.start,))
        self.xp.vecdot(dy[rows], y[rows], out=dot)
        self.xp.subtract(dy[rows], dot[:, None], out=dx[rows])
        dx[rows] *= y[rows]


def softmax_scratch(rows: int, width: int) -> tuple[tuple[int, ...], ...]:
    """Scratch shapes at most wanted here."""
    return ((block_rows(rows, width),),)
