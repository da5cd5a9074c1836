"""Causal attention of packed sequences: y = softmax(scale q k^T, causal) v, scale = 1 / sqrt(D).

Forward, of query i: s_ij = scale q_i k_j, lse_i = log(sum over j <= i of exp(s_ij)),
y_i = sum of p_ij v_j, p_ij = exp(s_ij - lse_i). Backward, with p computed again from lse:
dv_j = sum of p_ij dy_i; dp_ij = dy_i v_j; ds_ij = scale p_ij (dp_ij - sum of p_ij dp_ij over j);
dq_i = sum of ds_ij k_j; dk_j = sum of ds_ij q_i.

qkv (N, 3C) is read as (N, 3, H, D), y (N, C), lse (N, H); sequence s is rows
offsets[s]:offsets[s + 1]. One compiled call does the whole batch.

Order: sequences, tiles of QUERIES queries, heads; no (T, T) array exists. A tile's scores are held
transposed, p^T (keys, queries), queries along the lanes: the softmax runs over keys with plain
vectors, the causal mask is one of lanes, a short sequence is one vector a key. So q^T and dy^T
are made for all heads of a tile at once; all other matrices are read where they lie. p^T of 170
keys takes 32 KiB in float32: the products run from the L1 cache, or nearly. Backward adds a tile's
part to dk and dv in place, tile by tile: the order of the sums is fixed.
"""

from __future__ import annotations

import math
from typing import Any

from ...arena import Shape
from ...data.batch import Layout
from ...types import Array
from .attention_short import attend_short, attend_short_backward, is_short, short_scratch
from .code import VECTOR_BYTES
from .compile import compiled
from .instructions import ATTENTION, ATTENTION_BACKWARD, Instructions
from .tile import ADD, STORE, TWO, pack_strip, pack_strip_transposed, product, tile_1
from .vector import at, fma, keep_from, lanes, load, splat, store, vexp, vlog, vmax

QUERIES = 48  # of a tile: whole vectors of any width, and whole tiles of registers
LANES = VECTOR_BYTES // 4  # at most


def attention(
    self: Instructions, y: Array, lse: Array, qkv: Array, layout: Layout, n_head: int
) -> None:
    """Per sequence and head, p = softmax(scale q k^T) over the keys not after the query; y = p v.

    lse_i = log(sum_j exp(scale q_i k_j)), so that p_ij = exp(scale q_i k_j - lse_i).
    """
    channels, size = y.shape[1], len(layout.offsets) - 1
    (scratch,) = self.scratch(y.dtype, *self.attention_scratch(channels, n_head, layout.longest))
    arrays, sizes = (y, lse, qkv, layout.offsets), (channels, n_head)
    unit = self.attention_unit(channels, n_head)
    self.do(ATTENTION, len(y), *arrays, *sizes, scratch, unit, sequences=size)


def attention_backward(
    self: Instructions, dqkv: Array, dy: Array, y: Array, lse: Array, qkv: Array, layout: Layout,
    n_head: int,
) -> None:  # fmt: skip
    """dv = p^T dy; dp = dy v^T; ds = p (dp - sum(p dp)); dq = scale ds k; dk = scale ds^T q.

    y_i = sum_j p_ij v_j gives dv and dp; ds is the softmax's own backward; s_ij = scale q_i k_j
    gives dq and dk. In full precision y is read for short sequences only: its product with dy is
    that sum, else got while p is here.
    """
    channels, size = dy.shape[1], len(layout.offsets) - 1
    (scratch,) = self.scratch(dy.dtype, *self.attention_scratch(channels, n_head, layout.longest))
    arrays, sizes = (dqkv, dy, lse, qkv, layout.offsets), (channels, n_head)
    unit = self.attention_unit(channels, n_head)
    self.do(ATTENTION_BACKWARD, len(dy), *arrays, *sizes, scratch, unit, y, sequences=size)


def attention_scratch(channels: int, n_head: int, longest: int) -> tuple[Shape, ...]:
    """Scratch shapes for sequences up to `longest`: q^T, dy^T, lse^T, a number a query, p^T and
    ds^T; rows of a head in whole vectors."""
    width = -(-channels // n_head // LANES) * LANES
    tiles = (2 * channels + n_head + 1 + 2 * longest) * QUERIES + max(longest, QUERIES) * width
    return ((max(tiles, short_scratch(longest)),),)


@compiled
def attend(
    y: Any, lse: Any, qkv: Any, offsets: Any, sequences: Any, channels: Any, n_head: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """Forward for all sequences: places, offsets (S + 1,), scratch as `attention_scratch`."""
    end = int(offsets[sequences])
    for sequence in range(sequences):
        row, after = int(offsets[sequence]), int(offsets[sequence + 1])
        if is_short(y, after - row, channels, n_head):
            attend_short(at(y, row * channels), at(lse, row * n_head), at(qkv, row * 3 * channels),
                         after - row, channels, n_head, scratch)  # fmt: skip
            continue
        for start in range(0, after - row, QUERIES):
            query = row + start
            _forward_tile(at(y, query * channels), at(lse, query * n_head),
                          at(qkv, row * 3 * channels), end - row, start,
                          min(QUERIES, after - query), channels, n_head, scratch)  # fmt: skip


@compiled
def _forward_tile(
    y: Any, lse: Any, qkv: Any, rows: Any, start: Any, count: Any, channels: Any, n_head: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """`count` queries from `start` on: y, lse of the tile, qkv of the sequence and all after it."""
    logs = at(scratch, channels * QUERIES)
    p = at(logs, QUERIES)
    ld, keys, width = 3 * channels, start + count, channels // n_head
    packed = at(p, keys * QUERIES)
    w = _transposed(at(qkv, start * ld), ld, channels, count, rows - start, scratch)
    for head in range(n_head):
        column = head * width
        k = at(qkv, channels + column)
        _product(keys, w, width, k, ld, 1, at(scratch, column * w), w, p, w)
        _softmax(p, w, start, keys, 1 / math.sqrt(width), logs)
        left = rows * ld - 2 * channels - column  # numbers from v on
        v, ldv = _whole(at(k, channels), ld, keys, width, left, packed)
        _sum_keys(at(y, column), p, w, start, count, width, channels, v, ldv)
        for i in range(count):
            lse[i * n_head + head] = logs[i]


@compiled
def _softmax(p: Any, w: Any, start: Any, keys: Any, scale: Any, logs: Any) -> None:
    """Scores p^T (keys, w) become probabilities; logs: the lse of each query.

    The first key that not all lanes of a vector see is `seen`; from `stop` on none sees any.
    """
    for j in range(0, w, lanes(p)):
        seen, stop = start + j + 1, min(keys, start + j + lanes(p))
        m = other = load(p, j)
        for i in range(0, seen - 1, 2):  # two chains: one would wait for itself
            m, other = vmax(m, load(p, i * w + j)), vmax(other, load(p, (i + 1) * w + j))
        for i in range(seen - 1, stop):
            m = vmax(m, keep_from(load(p, i * w + j), i - seen + 1, -math.inf))
        m = vmax(m, other) * scale
        sums = splat(p, 0)
        for i in range(seen):
            e = vexp(fma(load(p, i * w + j), scale, -m))
            store(p, i * w + j, e)
            sums += e
        for i in range(seen, stop):
            e = keep_from(vexp(fma(load(p, i * w + j), scale, -m)), i - seen + 1, 0)
            store(p, i * w + j, e)
            sums += e
        part = 1 / sums
        for i in range(stop):
            store(p, i * w + j, load(p, i * w + j) * part)
        for i in range(stop, keys):
            store(p, i * w + j, splat(p, 0))
        store(logs, j, m + vlog(sums))


@compiled
def attend_backward(
    dqkv: Any, dy: Any, y: Any, lse: Any, qkv: Any, offsets: Any, sequences: Any, channels: Any,
    n_head: Any, scratch: Any,
) -> None:  # fmt: skip
    """Backward for all sequences."""
    end = int(offsets[sequences])
    for sequence in range(sequences):
        row, after = int(offsets[sequence]), int(offsets[sequence + 1])
        to = row * 3 * channels
        if is_short(y, after - row, channels, n_head):
            attend_short_backward(
                at(dqkv, to), at(dy, row * channels), at(y, row * channels), at(lse, row * n_head),
                at(qkv, to), after - row, channels, n_head, scratch,
            )  # fmt: skip
            continue
        for start in range(0, after - row, QUERIES):
            query = row + start
            _backward_tile(at(dqkv, to), at(dy, query * channels), at(lse, query * n_head),
                           at(qkv, to), end - row, start, min(QUERIES, after - query), channels,
                           n_head, scratch)  # fmt: skip


@compiled
def _backward_tile(
    dqkv: Any, dy: Any, lse: Any, qkv: Any, rows: Any, start: Any, count: Any, channels: Any,
    n_head: Any, scratch: Any,
) -> None:  # fmt: skip
    """`count` queries from `start` on: dq of theirs, and their part of dk and dv of all keys."""
    ld, keys, width = 3 * channels, start + count, channels // n_head
    dy_t = at(scratch, channels * QUERIES)
    lse_t = at(dy_t, channels * QUERIES)
    p = at(lse_t, n_head * QUERIES)
    ds = at(p, keys * QUERIES)
    packed = at(ds, keys * QUERIES)
    w = _transposed(at(qkv, start * ld), ld, channels, count, rows - start, scratch)
    _transposed(dy, channels, channels, count, rows - start, dy_t)
    for head in range(n_head):
        for i in range(min(w, rows - start)):
            lse_t[head * w + i] = lse[i * n_head + head]
    for head in range(n_head):
        column = head * width
        q, k, dk = at(qkv, column), at(qkv, channels + column), at(dqkv, channels + column)
        _product(keys, w, width, k, ld, 1, at(scratch, column * w), w, p, w)
        _product(keys, w, width, at(k, channels), ld, 1, at(dy_t, column * w), w, ds, w)
        _softmax_backward(p, ds, w, start, keys, 1 / math.sqrt(width), at(lse_t, head * w))
        after = rows * ld - column  # numbers from q on
        x, ldx = _whole(k, ld, keys, width, after - channels, packed)
        _sum_keys(at(dqkv, start * ld + column), ds, w, start, count, width, ld, x, ldx)
        x, ldx = _whole(at(q, start * ld), ld, count, width, after - start * ld, packed)
        _add_keys(dk, ds, w, start, count, width, ld, x, ldx)
        after = (rows - start) * channels - column
        x, ldx = _whole(at(dy, column), channels, count, width, after, packed)
        _add_keys(at(dk, channels), p, w, start, count, width, ld, x, ldx)


@compiled
def _softmax_backward(p: Any, ds: Any, w: Any, start: Any, keys: Any, scale: Any, lse: Any) -> None:
    """Scores p^T (keys, w) become probabilities, and ds^T, given as dp^T, what it is."""
    for j in range(0, w, lanes(p)):
        seen, stop = start + j + 1, min(keys, start + j + lanes(p))
        low, dot = -load(lse, j), splat(p, 0)
        for i in range(seen):
            e = vexp(fma(load(p, i * w + j), scale, low))
            store(p, i * w + j, e)
            dot = fma(e, load(ds, i * w + j), dot)
        for i in range(seen, stop):
            e = keep_from(vexp(fma(load(p, i * w + j), scale, low)), i - seen + 1, 0)
            store(p, i * w + j, e)
            dot = fma(e, load(ds, i * w + j), dot)
        dot *= scale
        for i in range(stop):
            to = i * w + j
            store(ds, to, load(p, to) * fma(load(ds, to), scale, -dot))
        for i in range(stop, keys):
            store(p, i * w + j, splat(p, 0))
            store(ds, i * w + j, splat(p, 0))


@compiled
def _sum_keys(
    c: Any, weights: Any, w: Any, start: Any, count: Any, width: Any, ld: Any, x: Any, ldx: Any
) -> None:
    """c_i = sum over the keys j that the tile's query i sees of weights^T_ji x_j."""
    for i in range(0, count, TWO):
        more = min(TWO, count - i)
        _product(more, width, start + i + more, at(weights, i), 1, w, x, ldx, at(c, i * ld), ld)


@compiled
def _add_keys(
    c: Any, weights: Any, w: Any, start: Any, count: Any, width: Any, ld: Any, x: Any, ldx: Any
) -> None:
    """c_j += sum over the tile's queries i of weights^T_ji x_i; the tile's own keys start so."""
    if start > 0:
        product(ADD, start, width, count, weights, w, 1, x, ldx, c, ld, c, ld)
    _product(count, width, count, at(weights, start * w), w, 1, x, ldx, at(c, start * ld), ld)


@compiled
def _transposed(x: Any, ldx: Any, width: Any, count: Any, rows: Any, x_t: Any) -> Any:
    """x^T (width, count), made up to whole vectors; x has `rows` rows. Returns their length.

    What the lanes past `count` hold goes nowhere: rows of the next sequences spare the masks.
    """
    whole = (count + lanes(x) - 1) // lanes(x) * lanes(x)
    return pack_strip_transposed(x, ldx, width, min(whole, rows), x_t)


@compiled
def _whole(x: Any, ldx: Any, count: Any, width: Any, left: Any, packed: Any) -> Any:
    """Rows of x (count, width) that may be read in whole vectors, and their distance.

    x itself, unless that would go past the `left` numbers from x to its array's end.
    """
    more = (width + lanes(x) - 1) // lanes(x) * lanes(x)
    if more == width or (count - 1) * ldx + more <= left:
        return x, ldx
    return packed, pack_strip(x, ldx, count, width, packed)


@compiled
def _product(
    m: Any, n: Any, k: Any, a: Any, as0: Any, as1: Any, b: Any, ldb: Any, c: Any, ldc: Any
) -> None:
    """c = a b; one vector (short sequences, small heads) need not look for its tile."""
    if n <= lanes(c):
        for i in range(0, m, 8):
            row = at(c, i * ldc)
            tile_1(STORE, m - i, n, k, at(a, i * as0), as0, as1, b, ldb, row, ldc, row, ldc)
    else:
        product(STORE, m, n, k, a, as0, as1, b, ldb, c, ldc, c, ldc)
