"""The backward pass of attention_bf16.py, which has its formulas."""

from __future__ import annotations

import math

from ...arena import Shape
from .attention_bf16 import LANES, turn_back
from .bf16 import (
    SIDE,
    STAGE,
    STEP,
    pack_columns,
    pack_rows,
    pack_strips,
    pack_strips_transposed,
    paired,
    words,
)
from .bf16_product import block_product, units_close, units_open
from .compile import compiled
from .tile import ADD, STORE
from .vector import at, fma, keep_from, load, splat, store, vexp, vsum

CHUNK = 256  # queries
KEPT = CHUNK // 2 + 16  # words in a row of them: rows a power of two apart share cache lines


def bf16_attention_scratch(channels: int, n_head: int, longest: int) -> tuple[Shape, ...]:
    """Scratch shapes at most wanted here, in this order; the forward pass needs less."""
    up, deep = (-(-n // SIDE) * SIDE for n in (longest, channels // n_head))
    kept = up * deep + deep * up // 2 + deep * CHUNK + 2 * up * KEPT
    tile = SIDE * deep + 2 * up * SIDE + up // 2 * SIDE + deep * SIDE + 2 * SIDE
    return ((STAGE + kept + tile,),)


@compiled
def attend_backward(unit, dqkv, dy, y, lse, qkv, offsets, sequences, channels, n_head, scratch):
    """Backward for all sequences."""
    units_open(unit, scratch)
    for sequence in range(sequences):
        row, rows = int(offsets[sequence]), int(offsets[sequence + 1] - offsets[sequence])
        for head in range(n_head):
            column = head * (channels // n_head)
            to, start = row * 3 * channels + column, row * channels + column
            _backward_head(unit, at(dqkv, to), at(dy, start), at(y, start),
                           at(lse, row * n_head + head), at(qkv, to), rows, channels, n_head,
                           scratch)  # fmt: skip
    units_close(unit, scratch)


@compiled
def _backward_head(unit, dq, dy, y, lse, q, rows, channels, n_head, scratch):
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
    pack_rows(at(q, channels), ld, rows, width, 1, a_k)
    pack_rows(at(q, 2 * channels), ld, rows, width, 1, a_v)
    pack_columns(at(q, channels), ld, width, rows, 1, a_kt, scratch)
    for chunk in range(0, rows, CHUNK):
        count = min(CHUNK, rows - chunk)
        for start in range(chunk, chunk + count, SIDE):
            column = (start - chunk) // 2
            _backward_tile(unit, at(dq, start * ld), at(dy, start * channels),
                           at(y, start * channels), at(lse, start * n_head), at(q, start * ld),
                           start, min(SIDE, rows - start), rows, channels, n_head, a_k, a_v, a_kt,
                           at(a_p, column), at(a_ds, column), rest, scratch)  # fmt: skip
        pack_strips(at(q, chunk * ld), ld, count, width, 1, b_q)
        pack_strips(at(dy, chunk * channels), channels, count, width, 1, b_dy)
        for key in range(0, chunk + count, SIDE):
            first = max(0, key - chunk)  # query of the chunk that sees any of these keys
            mode, more = STORE if key >= chunk else ADD, min(SIDE, chunk + count - key)
            a, b, left = key * KEPT + first // 2, first // 2 * SIDE, count - first
            dk = at(dq, key * ld + channels)
            dv = at(dk, channels)
            block_product(unit, mode, more, width, left, at(a_ds, a), KEPT, at(b_q, b),
                          words(count), dk, ld, dk, ld, scratch)  # fmt: skip
            block_product(unit, mode, more, width, left, at(a_p, a), KEPT, at(b_dy, b),
                          words(count), dv, ld, dv, ld, scratch)  # fmt: skip


@compiled
def _backward_tile(
    unit, dq, dy, y, lse, q, start, count, rows, channels, n_head, a_k, a_v, a_kt, a_p, a_ds,
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
    pack_strips_transposed(q, ld, width, count, 1, b_q, stage)
    pack_strips_transposed(dy, channels, width, count, 1, b_dy, stage)
    block_product(unit, STORE, keys, SIDE, width, a_k, depth, b_q, depth, scores, SIDE, scores,
                  SIDE, stage)  # fmt: skip
    block_product(unit, STORE, keys, SIDE, width, a_v, depth, b_dy, depth, slopes, SIDE, slopes,
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
    _slopes(scores, slopes, start, scale, statistics, a_p, a_ds, b_ds)
    block_product(unit, STORE, width, SIDE, keys, a_kt, words(rows), b_ds, words(keys), dq_t, SIDE,
                  dq_t, SIDE, stage)  # fmt: skip
    turn_back(dq_t, dq, ld, width, count)


@compiled
def _slopes(scores, slopes, start, scale, statistics, a_p, a_ds, b_ds):
    """The words p^T and ds^T of a tile from s^T and dp^T; statistics: -lse, -scale sum of p dp."""
    low, high = load(statistics, 0), load(statistics, LANES)
    dot, dots = load(statistics, SIDE), load(statistics, SIDE + LANES)
    for block in range(0, start + SIDE, SIDE):
        for i in range(block, block + STEP):
            to, below = i * SIDE, (i + STEP) * SIDE
            p0 = vexp(fma(load(scores, to), scale, low))
            p1 = vexp(fma(load(scores, to + LANES), scale, high))
            p2 = vexp(fma(load(scores, below), scale, low))
            p3 = vexp(fma(load(scores, below + LANES), scale, high))
            ds0 = p0 * fma(load(slopes, to), scale, dot)
            ds1 = p1 * fma(load(slopes, to + LANES), scale, dots)
            ds2 = p2 * fma(load(slopes, below), scale, dot)
            ds3 = p3 * fma(load(slopes, below + LANES), scale, dots)
            if block == start:
                n0, n1 = i - start, i - start - LANES
                n2, n3 = n0 + STEP, n1 + STEP
                p0, ds0 = keep_from(p0, n0, 0), keep_from(ds0, n0, 0)
                p1, ds1 = keep_from(p1, n1, 0), keep_from(ds1, n1, 0)
                p2, ds2 = keep_from(p2, n2, 0), keep_from(ds2, n2, 0)
                p3, ds3 = keep_from(p3, n3, 0), keep_from(ds3, n3, 0)
            store(a_p, i * KEPT, paired(p0, p1))
            store(a_p, (i + STEP) * KEPT, paired(p2, p3))
            store(a_ds, i * KEPT, paired(ds0, ds1))
            store(a_ds, (i + STEP) * KEPT, paired(ds2, ds3))
            store(b_ds, (i - block // 2) * SIDE, paired(ds0, ds2))
            store(b_ds, (i - block // 2) * SIDE + LANES, paired(ds1, ds3))
