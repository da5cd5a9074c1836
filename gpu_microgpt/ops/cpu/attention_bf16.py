"""attention.py's passes with the operands of all products rounded to bfloat16 (see there for the
formulas), for heads of whole vectors: D a multiple of 16.

Order: sequences, heads, tiles of 32 queries. Scores are held transposed, p^T (keys, queries), a
tile's 32 queries along two vectors: a softmax runs over keys with plain vectors, and what it gives
is rounded where it is made, into the words that the next product wants. Of a head, k and v are
packed once. With a and b as bf16.py has them:

    forward    s^T = a(k) b(q^T)    y^T = a(v^T) b(e^T), divided by the sums of e
    backward   s^T = a(k) b(q^T)    dp^T = a(v) b(dy^T)    dq^T = a(k^T) b(ds^T)
               dv = a(p^T) b(dy)    dk = a(ds^T) b(q)

dv and dk sum over queries: their operands are kept for up to CHUNK queries, so that results are
added to memory once for each. sum of p dp is taken as dy y. lse, sums and results are float32.
"""

from __future__ import annotations

import math

from ...arena import Shape
from ...data.batch import Layout
from ...types import Array
from ..reference.context import Context
from .attention import attention as full_attention
from .attention import attention_backward as full_attention_backward
from .attention import attention_scratch as full_scratch
from .bf16 import (
    SIDE,
    joined,
    pack_columns,
    pack_rows,
    pack_strips,
    pack_strips_transposed,
    paired,
    words,
)
from .bf16_product import STAGE, block_product, units_close, units_open
from .compile import compiled
from .tile import ADD, STORE
from .vector import (
    at,
    fma,
    keep_from,
    load,
    splat,
    store,
    transpose,
    transpose_some,
    vexp,
    vmax,
    vsum,
)

LANES = 16
CHUNK = 256  # queries
KEPT = CHUNK // 2 + 16  # words in a row of them: rows a power of two apart share cache lines


@compiled
def attend(amx, y, lse, qkv, offsets, channels, n_head, scratch):
    """Forward for all sequences: addresses, offsets (S + 1,), scratch as `bf16_scratch`."""
    units_open(amx, scratch)
    for sequence in range(len(offsets) - 1):
        row, rows = int(offsets[sequence]), int(offsets[sequence + 1] - offsets[sequence])
        for head in range(n_head):
            column = head * (channels // n_head)
            _forward_head(amx, at(y, row * channels + column), at(lse, row * n_head + head),
                          at(qkv, row * 3 * channels + column), rows, channels, n_head,
                          scratch)  # fmt: skip
    units_close(amx, scratch)


@compiled
def _forward_head(amx, y, lse, q, rows, channels, n_head, scratch):
    """One head of a sequence: y, lse, q at its first number."""
    ld, width, up = 3 * channels, channels // n_head, words(rows) * 2
    depth, deep = words(width), words(width) * 2
    a_k = at(scratch, STAGE)
    a_v = at(a_k, up * depth)
    b_q = at(a_v, deep * words(rows))
    scores = at(b_q, SIDE * depth)
    y_t = at(scores, up * SIDE)
    statistics = at(y_t, deep * SIDE)
    pack_rows(at(q, channels), ld, rows, width, a_k)
    pack_columns(at(q, 2 * channels), ld, width, rows, a_v)
    for start in range(0, rows, SIDE):
        count = min(SIDE, rows - start)
        keys = start + count
        pack_strips_transposed(at(q, start * ld), ld, width, count, b_q)
        block_product(amx, STORE, keys, SIDE, width, a_k, depth, b_q, depth, scores, SIDE, scores,
                      SIDE, scratch)  # fmt: skip
        for j in range(0, SIDE, LANES):
            _exponentials(scores, start, keys, j, 1 / math.sqrt(width), statistics)
        block_product(amx, STORE, width, SIDE, keys, a_v, words(rows), scores, words(keys), y_t,
                      SIDE, y_t, SIDE, scratch)  # fmt: skip
        for j in range(0, SIDE, LANES):
            part = 1 / load(statistics, SIDE + j)
            for d in range(width):
                store(y_t, d * SIDE + j, load(y_t, d * SIDE + j) * part)
        _turn_back(y_t, at(y, start * channels), channels, width, count)
        for i in range(count):
            to = (start + i) * n_head
            lse[to] = statistics[i] + math.log(statistics[SIDE + i])


@compiled
def _exponentials(scores, start, keys, j, scale, statistics):
    """Scores of 16 queries, from j on, become the words e^T, which fill half their place; and their
    largest scores and sums."""
    seen = start + j + 1  # keys from here on not all lanes see
    m = other = load(scores, j)
    for i in range(0, seen - 1, 2):  # two chains: one would wait for itself
        m, other = (
            vmax(m, load(scores, i * SIDE + j)),
            vmax(other, load(scores, (i + 1) * SIDE + j)),
        )
    for i in range(seen - 1, min(keys, seen - 1 + LANES)):
        m = vmax(m, keep_from(load(scores, i * SIDE + j), i - seen + 1, -math.inf))
    m = vmax(m, other) * scale
    sums = splat(scores, 0)
    for i in range(0, start, 2):
        first = vexp(fma(load(scores, i * SIDE + j), scale, -m))
        second = vexp(fma(load(scores, (i + 1) * SIDE + j), scale, -m))
        sums += first + second
        store(scores, i // 2 * SIDE + j, paired(first, second))
    for i in range(start, start + SIDE, 2):
        first = vexp(fma(load(scores, i * SIDE + j), scale, -m))
        second = vexp(fma(load(scores, (i + 1) * SIDE + j), scale, -m))
        first = keep_from(first, _hidden(i, start + j, keys), 0)
        second = keep_from(second, _hidden(i + 1, start + j, keys), 0)
        sums += first + second
        store(scores, i // 2 * SIDE + j, paired(first, second))
    store(statistics, j, m)
    store(statistics, SIDE + j, sums)


@compiled
def _hidden(key, query, keys):
    """How many of the 16 queries from `query` on do not see a key; none sees one that is not."""
    return key - query if key < keys else LANES


@compiled
def _turn_back(x_t, x, ld, width, count):
    """x (count, width), rows ld apart, from x^T (width, SIDE)."""
    for j in range(0, count, LANES):
        for d in range(0, width, LANES):
            if j + LANES <= count:
                transpose(x_t, d * SIDE + j, SIDE, x, j * ld + d, ld)
            else:
                transpose_some(x_t, d * SIDE + j, SIDE, LANES, count - j, x, j * ld + d, ld)


@compiled
def attend_backward(amx, dqkv, dy, y, lse, qkv, offsets, channels, n_head, scratch):
    """Backward for all sequences."""
    units_open(amx, scratch)
    for sequence in range(len(offsets) - 1):
        row, rows = int(offsets[sequence]), int(offsets[sequence + 1] - offsets[sequence])
        for head in range(n_head):
            column = head * (channels // n_head)
            to, start = row * 3 * channels + column, row * channels + column
            _backward_head(amx, at(dqkv, to), at(dy, start), at(y, start),
                           at(lse, row * n_head + head), at(qkv, to), rows, channels, n_head,
                           scratch)  # fmt: skip
    units_close(amx, scratch)


@compiled
def _backward_head(amx, dq, dy, y, lse, q, rows, channels, n_head, scratch):
    """One head of a sequence, CHUNK queries at a time."""
    ld, width, up = 3 * channels, channels // n_head, words(rows) * 2
    depth, deep = words(width), words(width) * 2
    a_k = at(scratch, STAGE)
    a_v = at(a_k, up * depth)
    a_kt = at(a_v, up * depth)
    b_q = at(a_kt, deep * words(rows))
    b_dy = at(b_q, deep * words(CHUNK))
    a_p = at(b_dy, deep * words(CHUNK))
    a_ds = at(a_p, up * KEPT)
    rest = at(a_ds, up * KEPT)
    pack_rows(at(q, channels), ld, rows, width, a_k)
    pack_rows(at(q, 2 * channels), ld, rows, width, a_v)
    pack_columns(at(q, channels), ld, width, rows, a_kt)
    for chunk in range(0, rows, CHUNK):
        count = min(CHUNK, rows - chunk)
        for start in range(chunk, chunk + count, SIDE):
            column = (start - chunk) // 2
            _backward_tile(amx, at(dq, start * ld), at(dy, start * channels),
                           at(y, start * channels), at(lse, start * n_head), at(q, start * ld),
                           start, min(SIDE, rows - start), rows, channels, n_head, a_k, a_v, a_kt,
                           at(a_p, column), at(a_ds, column), rest, scratch)  # fmt: skip
        pack_strips(at(q, chunk * ld), ld, count, width, b_q)
        pack_strips(at(dy, chunk * channels), channels, count, width, b_dy)
        for key in range(0, chunk + count, SIDE):
            first = max(0, key - chunk)  # query of the chunk that sees any of these keys
            mode, more = STORE if key >= chunk else ADD, min(SIDE, chunk + count - key)
            a, b, left = key * KEPT + first // 2, first // 2 * SIDE, count - first
            dk = at(dq, key * ld + channels)
            dv = at(dk, channels)
            block_product(amx, mode, more, width, left, at(a_ds, a), KEPT, at(b_q, b),
                          words(count), dk, ld, dk, ld, scratch)  # fmt: skip
            block_product(amx, mode, more, width, left, at(a_p, a), KEPT, at(b_dy, b),
                          words(count), dv, ld, dv, ld, scratch)  # fmt: skip


@compiled
def _backward_tile(
    amx, dq, dy, y, lse, q, start, count, rows, channels, n_head, a_k, a_v, a_kt, a_p, a_ds,
    scratch, stage,
):  # fmt: skip
    """dq of `count` queries from `start` on, and their words in a_p and a_ds."""
    ld, width, keys = 3 * channels, channels // n_head, start + count
    depth = words(width)
    b_q = at(scratch, 0)
    b_dy = at(b_q, SIDE * depth)
    scores = at(b_dy, SIDE * depth)
    slopes = at(scores, 2 * words(rows) * SIDE)
    b_ds = at(slopes, 2 * words(rows) * SIDE)
    dq_t = at(b_ds, words(rows) * SIDE)
    statistics = at(dq_t, 2 * depth * SIDE)
    pack_strips_transposed(q, ld, width, count, b_q)
    pack_strips_transposed(dy, channels, width, count, b_dy)
    block_product(amx, STORE, keys, SIDE, width, a_k, depth, b_q, depth, scores, SIDE, scores, SIDE,
                  stage)  # fmt: skip
    block_product(amx, STORE, keys, SIDE, width, a_v, depth, b_dy, depth, slopes, SIDE, slopes,
                  SIDE, stage)  # fmt: skip
    scale = 1 / math.sqrt(width)
    for i in range(SIDE):
        statistics[i] = statistics[SIDE + i] = 0
    for i in range(count):
        s = splat(dy, 0)
        for d in range(0, width, LANES):
            s = fma(load(dy, i * channels + d), load(y, i * channels + d), s)
        statistics[i] = -lse[i * n_head]
        statistics[SIDE + i] = -vsum(s) * scale
    _slopes(scores, slopes, start, keys, scale, statistics, a_p, a_ds, b_ds)
    block_product(amx, STORE, width, SIDE, keys, a_kt, words(rows), b_ds, words(keys), dq_t, SIDE,
                  dq_t, SIDE, stage)  # fmt: skip
    _turn_back(dq_t, dq, ld, width, count)


@compiled
def _slopes(scores, slopes, start, keys, scale, statistics, a_p, a_ds, b_ds):
    """The words p^T and ds^T of a tile from s^T and dp^T; statistics: -lse, -scale sum of p dp."""
    low, high = load(statistics, 0), load(statistics, LANES)
    dot, dots = load(statistics, SIDE), load(statistics, SIDE + LANES)
    for i in range(0, start + SIDE, 2):
        to, below = i * SIDE, (i + 1) * SIDE
        p0 = vexp(fma(load(scores, to), scale, low))
        p1 = vexp(fma(load(scores, to + LANES), scale, high))
        p2 = vexp(fma(load(scores, below), scale, low))
        p3 = vexp(fma(load(scores, below + LANES), scale, high))
        ds0 = p0 * fma(load(slopes, to), scale, dot)
        ds1 = p1 * fma(load(slopes, to + LANES), scale, dots)
        ds2 = p2 * fma(load(slopes, below), scale, dot)
        ds3 = p3 * fma(load(slopes, below + LANES), scale, dots)
        if i >= start:
            n0, n1 = _hidden(i, start, keys), _hidden(i, start + LANES, keys)
            n2, n3 = _hidden(i + 1, start, keys), _hidden(i + 1, start + LANES, keys)
            p0, ds0 = keep_from(p0, n0, 0), keep_from(ds0, n0, 0)
            p1, ds1 = keep_from(p1, n1, 0), keep_from(ds1, n1, 0)
            p2, ds2 = keep_from(p2, n2, 0), keep_from(ds2, n2, 0)
            p3, ds3 = keep_from(p3, n3, 0), keep_from(ds3, n3, 0)
        store(a_p, i * KEPT, joined(p0, p1))
        store(a_p, (i + 1) * KEPT, joined(p2, p3))
        store(a_ds, i * KEPT, joined(ds0, ds1))
        store(a_ds, (i + 1) * KEPT, joined(ds2, ds3))
        store(b_ds, i // 2 * SIDE, paired(ds0, ds2))
        store(b_ds, i // 2 * SIDE + LANES, paired(ds1, ds3))


@compiled
def forward(amx, y, lse, qkv, offsets, n_head, scratch):
    """`attend` of arrays."""
    attend(amx, at(y, 0), at(lse, 0), at(qkv, 0), offsets, y.shape[1], n_head, at(scratch, 0))


@compiled
def backward(amx, dqkv, dy, y, lse, qkv, offsets, n_head, scratch):
    """`attend_backward` of arrays."""
    attend_backward(amx, at(dqkv, 0), at(dy, 0), at(y, 0), at(lse, 0), at(qkv, 0), offsets,
                    dy.shape[1], n_head, at(scratch, 0))  # fmt: skip


class NarrowContext(Context):
    """A context that says on which unit it multiplies bfloat16."""

    amx: int


def attention(
    self: NarrowContext, y: Array, lse: Array, qkv: Array, layout: Layout, n_head: int
) -> None:
    """As attention.py's."""
    if not _fits(y.shape[1], n_head):
        full_attention(self, y, lse, qkv, layout, n_head)
        return
    (scratch,) = self.scratch(y.dtype, *_scratch(y.shape[1], n_head, layout.longest))
    forward(self.amx, y, lse, qkv, layout.offsets, n_head, scratch)


def attention_backward(
    self: NarrowContext, dqkv: Array, dy: Array, y: Array, lse: Array, qkv: Array, layout: Layout,
    n_head: int,
) -> None:  # fmt: skip
    """As attention.py's; y is read."""
    if not _fits(dy.shape[1], n_head):
        full_attention_backward(self, dqkv, dy, y, lse, qkv, layout, n_head)
        return
    (scratch,) = self.scratch(dy.dtype, *_scratch(dy.shape[1], n_head, layout.longest))
    backward(self.amx, dqkv, dy, y, lse, qkv, layout.offsets, n_head, scratch)


def attention_scratch(rows: int, channels: int, n_head: int, block_size: int) -> tuple[Shape, ...]:
    """Scratch shapes at most wanted here."""
    if not _fits(channels, n_head):
        return full_scratch(rows, channels, n_head, block_size)
    return _scratch(channels, n_head, min(rows, block_size))


def _fits(channels: int, n_head: int) -> bool:
    """Whether heads are whole vectors."""
    return channels % n_head == 0 and channels // n_head % LANES == 0


def _scratch(channels: int, n_head: int, longest: int) -> tuple[Shape, ...]:
    """That of the backward pass, in its order; the forward pass needs less."""
    up, deep = (-(-n // SIDE) * SIDE for n in (longest, channels // n_head))
    kept = up * deep + deep * up // 2 + deep * CHUNK + 2 * up * KEPT
    tile = SIDE * deep + 2 * up * SIDE + up // 2 * SIDE + deep * SIDE + 2 * SIDE
    return ((STAGE + kept + tile,),)
