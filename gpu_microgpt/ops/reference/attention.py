"""Causal multi-head attention: y = softmax(q k^T / sqrt(D), causal) v (Vaswani et al. 2017).

Worked in tiles, so that no (T, T) array of probabilities ever exists: forward keeps the log of
each row's sum (lse), backward computes the probabilities again from it (Dao et al. 2022). A tile
of scores is held transposed, (keys, queries): then the largest score and the sum a query run over
the outer axis, which NumPy does with vectors, and the diagonal's mask meets whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...data.batch import Layout
from ...types import Array
from .context import BLOCK, Context

TILE = 64  # queries (forward) or keys (backward) a tile


def attention(self: Context, y: Array, lse: Array, qkv: Array, layout: Layout, n_head: int) -> None:
    """Per sequence and head, p = softmax(scale q k^T) over the keys not after the query; y = p v.

    lse_i = log(sum_j exp(scale q_i k_j)), so that p_ij = exp(scale q_i k_j - lse_i).
    """
    xp, scale = self.xp, (qkv.shape[1] // 3 // n_head) ** -0.5
    for group in _groups(layout, qkv.shape[1] // 3, n_head):
        q, k, v = _heads(qkv, group, 3)
        (out,), row_lse = _heads(y, group, 1), _per_head(lse, group)
        *batch, length, width = q.shape
        for start in range(0, length, TILE):
            stop = min(start + TILE, length)
            count = stop - start
            q_t, p_t, ones, largest, total = self.scratch(
                q.dtype,
                (*batch, width, count),
                (*batch, stop, count),
                (1, stop),
                (*batch, 1, count),
                (*batch, 1, count),
            )
            xp.multiply(q[:, :, start:stop].swapaxes(-1, -2), scale, out=q_t)
            xp.matmul(k[:, :, :stop], q_t, out=p_t)
            p_t[:, :, start:] += self.causal_mask(TILE, p_t.dtype)[:count, :count]
            xp.max(p_t, axis=-2, keepdims=True, out=largest)
            p_t -= largest
            xp.exp(p_t, out=p_t)
            ones.fill(1)
            xp.matmul(ones, p_t, out=total)
            y_tile = out[:, :, start:stop]
            xp.matmul(p_t.swapaxes(-1, -2), v[:, :, :stop], out=y_tile)
            y_tile /= total.swapaxes(-1, -2)
            xp.log(total, out=total)
            xp.add(largest[:, :, 0], total[:, :, 0], out=row_lse[:, :, start:stop])


def attention_backward(
    self: Context, dqkv: Array, dy: Array, y: Array, lse: Array, qkv: Array, layout: Layout,
    n_head: int,
) -> None:  # fmt: skip
    """dv = p^T dy; dp = dy v^T; ds = p (dp - sum(dy y)); dq = scale ds k; dk = scale ds^T q.

    y_i = sum_j p_ij v_j gives dv and dp. The softmax's own backward is ds_ij = p_ij (dp_ij -
    sum_k dp_ik p_ik), and sum_k dp_ik p_ik = dy_i . sum_k p_ik v_k = dy_i . y_i: one number a row.
    s_ij = scale q_i k_j gives dq and dk. Tiles are keys [start, stop) and all queries from start
    on, so dk and dv are written once and only dq is summed.
    """
    for group in _groups(layout, qkv.shape[1] // 3, n_head):
        arrays = [*_heads(dqkv, group, 3), *_heads(qkv, group, 3), *_heads(dy, group, 1)]
        _group_backward(self, [*arrays, *_heads(y, group, 1), _per_head(lse, group)])


def _group_backward(self: Context, arrays: list[Array]) -> None:
    """The formulas above for some sequences and heads: all (S, H, T, D) but lse (S, H, T)."""
    dq, dk, dv, q, k, v, dy, y, lse = arrays
    xp, scale = self.xp, q.shape[-1] ** -0.5
    *batch, length, width = q.shape
    for start in range(0, length, TILE):
        stop = min(start + TILE, length)
        count, queries = stop - start, length - start
        q_t, dy_t, sum_dq, dot, p_t, ds_t, part = self.scratch(
            q.dtype,
            (*batch, width, length),
            (*batch, width, length),
            (*batch, length, width),
            (*batch, length),
            (*batch, count, queries),
            (*batch, count, queries),
            (*batch, queries, width),
        )
        if start == 0:
            xp.multiply(q.swapaxes(-1, -2), scale, out=q_t)
            dy_t[...] = dy.swapaxes(-1, -2)
            xp.vecdot(dy, y, out=dot)
        xp.matmul(k[:, :, start:stop], q_t[..., start:], out=p_t)
        p_t[..., :count] += self.causal_mask(TILE, p_t.dtype)[:count, :count]
        p_t -= lse[:, :, None, start:]
        xp.exp(p_t, out=p_t)
        xp.matmul(p_t, dy[:, :, start:], out=dv[:, :, start:stop])
        xp.matmul(v[:, :, start:stop], dy_t[..., start:], out=ds_t)
        ds_t -= dot[:, :, None, start:]
        ds_t *= p_t
        dk_tile = dk[:, :, start:stop]
        xp.matmul(ds_t, q[:, :, start:], out=dk_tile)
        dk_tile *= scale
        xp.matmul(ds_t.swapaxes(-1, -2), k[:, :, start:stop], out=part if start else sum_dq)
        if start:
            sum_dq[:, :, start:] += part
    xp.multiply(sum_dq, scale, out=dq)


Group = tuple[slice, int, int, int, slice]  # rows, sequences, length, all heads, heads taken


def _groups(layout: Layout, channels: int, n_head: int) -> Iterator[Group]:
    """Cut the batch into equal-length sequences and heads whose tile fits the cache."""
    for run in layout.runs:
        tile = run.length * max(min(run.length, TILE), channels // n_head)
        heads = max(1, min(n_head, BLOCK // tile))
        sequences = max(1, min(run.count, BLOCK // (tile * n_head)))
        for first in range(0, run.count, sequences):
            count = min(sequences, run.count - first)
            row = run.row + first * run.length
            rows = slice(row, row + count * run.length)
            for head in range(0, n_head, heads):
                yield rows, count, run.length, n_head, slice(head, head + heads)


def _heads(x: Array, group: Group, parts: int) -> Any:
    """The group's rows of x (N, parts C) as `parts` views (S, H, T, D)."""
    rows, count, length, n_head, heads = group
    split = x[rows].reshape(count, length, parts, n_head, -1)
    return split.transpose(2, 0, 3, 1, 4)[:, :, heads]


def _per_head(x: Array, group: Group) -> Array:
    """The group's rows of x (N, H) as a view (S, H, T)."""
    rows, count, length, n_head, heads = group
    return x[rows].reshape(count, length, n_head).transpose(0, 2, 1)[:, heads]


def attention_scratch(
    rows: int, channels: int, n_head: int, block_size: int
) -> tuple[tuple[int, ...], ...]:
    """Scratch shapes at most wanted here: those of backward, bounded as in `_groups`."""
    width = channels // n_head
    tile = max(BLOCK, block_size * max(min(block_size, TILE), width))
    wide = min(tile, rows * channels)
    tall = min(tile, rows * n_head * min(block_size, TILE))
    return (*((wide,),) * 4, *((tall,),) * 2, (rows * n_head,))
