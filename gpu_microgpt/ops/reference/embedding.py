"""Token and position embedding: x = wte[tokens] + wpe[positions]."""

from __future__ import annotations

from ...types import Array
from .context import Context, block_rows

ONE_HOT = 512  # up to so many ids a product with a one-hot matrix beats sorting


def embedding(
    self: Context, x: Array, tokens: Array, positions: Array, wte: Array, wpe: Array
) -> None:
    """Look up both tables and add. Ids are in range by construction."""
    wte.take(tokens, 0, x, "clip")  # "raise" would make NumPy copy the result
    for rows in self.blocks(*x.shape):
        (place,) = self.scratch(x.dtype, x[rows].shape)
        wpe.take(positions[rows], 0, place, "clip")
        x[rows] += place


def embedding_backward(
    self: Context, dwte: Array, dwpe: Array, dy: Array, tokens: Array, positions: Array, add: bool
) -> None:
    """Sum the rows of dy that each table row went to.

    x_n = sum_i onehot(id_n)_i w_i, so dL/dw_i = sum over n with id_n = i of dy_n, for both tables.
    """
    if not add:
        dwte.fill(0)
        dwpe.fill(0)
    _add_rows(self, dwte, dy, tokens)
    _add_rows(self, dwpe, dy, positions)


def _add_rows(self: Context, dw: Array, dy: Array, ids: Array) -> None:
    """dw[ids[n]] += dy[n], in a fixed order: as one product dw += onehot^T dy, or sorted."""
    size, width = dw.shape
    if size > ONE_HOT:
        _add_sorted_rows(self, dw, dy, ids)
        return
    for rows in self.blocks(len(ids), size):
        count = rows.stop - rows.start
        one_hot, total = self.scratch(dw.dtype, (count, size), (size, width))
        one_hot.fill(0)
        one_hot[self.xp.arange(count), ids[rows]] = 1
        self.xp.matmul(one_hot.T, dy[rows], out=total)
        dw += total


def _add_sorted_rows(self: Context, dw: Array, dy: Array, ids: Array) -> None:
    """The same for many ids: sort, then one sum for each stretch of equal ids."""
    xp = self.xp
    order = xp.argsort(ids, kind="stable")
    ids = ids[order]
    starts = xp.concatenate((xp.zeros(1, int), xp.flatnonzero(ids[1:] != ids[:-1]) + 1))
    step = block_rows(dy.shape[1], len(ids))
    for first in range(0, dy.shape[1], step):
        columns = slice(first, first + step)
        dw[ids[starts], columns] += xp.add.reduceat(dy[order, columns], starts, axis=0)


def embedding_scratch(rows: int, channels: int, ids: int) -> tuple[tuple[int, ...], ...]:
    """Scratch shapes at most wanted here, for the larger of the two tables."""
    ids = min(ids, ONE_HOT)
    look_up = (block_rows(rows, channels), channels)
    one_hot = (block_rows(rows, ids), ids)
    return (look_up, one_hot, (ids, channels))
