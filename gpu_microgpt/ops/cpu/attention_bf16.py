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

from .bf16 import (
    SIDE,
    STAGE,
    STEP,
    pack_columns,
    pack_rows,
    pack_strips_transposed,
    paired,
    words,
)
from .bf16_product import block_product, units_close, units_open
from .compile import compiled
from .tile import STORE
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
)

LANES = 16


def fits(channels: int, n_head: int) -> bool:
    """Whether heads are whole vectors."""
    return channels % n_head == 0 and channels // n_head % LANES == 0


@compiled
def attend(unit, y, lse, qkv, offsets, sequences, channels, n_head, scratch):
    """Forward for all sequences: addresses, offsets (S + 1,), scratch as attention_bf16_backward.py
    plans it for both passes."""
    units_open(unit, scratch)
    for sequence in range(sequences):
        row, rows = int(offsets[sequence]), int(offsets[sequence + 1] - offsets[sequence])
        for head in range(n_head):
            column = head * (channels // n_head)
            _forward_head(unit, at(y, row * channels + column), at(lse, row * n_head + head),
                          at(qkv, row * 3 * channels + column), rows, channels, n_head,
                          scratch)  # fmt: skip
    units_close(unit, scratch)


@compiled
def _forward_head(unit, y, lse, q, rows, channels, n_head, scratch):
    """One head of a sequence: y, lse, q at its first number."""
    ld, width, up = 3 * channels, channels // n_head, words(rows) * 2
    depth, deep = words(width), words(width) * 2
    a_k = at(scratch, STAGE)
    a_v = at(a_k, up * depth)
    b_q = at(a_v, deep * words(rows))
    scores = at(b_q, SIDE * depth)
    y_t = at(scores, up * SIDE)
    statistics = at(y_t, deep * SIDE)
    pack_rows(at(q, channels), ld, rows, width, 1, a_k)
    pack_columns(at(q, 2 * channels), ld, width, rows, 1, a_v, scratch)
    for start in range(0, rows, SIDE):
        count = min(SIDE, rows - start)
        keys = start + count
        pack_strips_transposed(at(q, start * ld), ld, width, count, 1, b_q, scratch)
        block_product(unit, STORE, keys, SIDE, width, a_k, depth, b_q, depth, scores, SIDE, scores,
                      SIDE, scratch)  # fmt: skip
        for j in range(0, SIDE, LANES):
            _exponentials(scores, start, keys, j, 1 / math.sqrt(width), statistics)
        block_product(unit, STORE, width, SIDE, keys, a_v, words(rows), scores, words(keys), y_t,
                      SIDE, y_t, SIDE, scratch)  # fmt: skip
        for j in range(0, SIDE, LANES):
            part = 1 / load(statistics, SIDE + j)
            for d in range(width):
                store(y_t, d * SIDE + j, load(y_t, d * SIDE + j) * part)
        turn_back(y_t, at(y, start * channels), channels, width, count)
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
    for i in range(0, start, SIDE):
        for row in range(i, i + STEP):
            first = vexp(fma(load(scores, row * SIDE + j), scale, -m))
            second = vexp(fma(load(scores, (row + STEP) * SIDE + j), scale, -m))
            sums += first + second
            store(scores, (row - i // 2) * SIDE + j, paired(first, second))
    for i in range(start, start + STEP):
        first = vexp(fma(load(scores, i * SIDE + j), scale, -m))
        second = vexp(fma(load(scores, (i + STEP) * SIDE + j), scale, -m))
        first = keep_from(first, i - start - j, 0)
        second = keep_from(second, i + STEP - start - j, 0)
        sums += first + second
        store(scores, (i - start // 2) * SIDE + j, paired(first, second))
    store(statistics, j, m)
    store(statistics, SIDE + j, sums)


@compiled
def turn_back(x_t, x, ld, width, count):
    """x (count, width), rows ld apart, from x^T (width, SIDE)."""
    for j in range(0, count, LANES):
        for d in range(0, width, LANES):
            if j + LANES <= count:
                transpose(x_t, d * SIDE + j, SIDE, x, j * ld + d, ld)
            else:
                transpose_some(x_t, d * SIDE + j, SIDE, LANES, count - j, x, j * ld + d, ld)
