"""Products of operands packed as bf16.py says: by AMX, or where `unit` is DOTS by AVX512_BF16.

    block_product(unit, mode, m, n, k, a, lda, b, ldb, c, ldc, r, ldr, stage)

Rows of a lie `lda` words apart, strips of b `ldb` rows; c (m, n) in float32, rows `ldc` apart, r
(m, n) likewise; the modes are tile.py's. Sums stay in registers over all of k: blocks of 32 x 32 in
AMX's, or tiles of 12 x 32 in vectors, with tile.py's loop, in which a word of a meets a vector of
words of b. A strip of b stays in the L1 cache while the rows of a pass by. Nothing outside c is
written; stage: STAGE numbers of scratch.

For few rows: `few_product`, whose b^T is packed in rows.
"""

from __future__ import annotations

from .amx import amx_block, tiles_close, tiles_open
from .bf16 import SIDE, STEP, dot, pack_rows, words
from .compile import compiled
from .dots import dots_word, finished
from .instructions import DOTS, SPLIT
from .tile import TWO, tile_word
from .vector import at, lanes, store_some

dot_tile = tile_word(TWO, 2, dot)
dots_of = dots_word(dot)


@compiled
def parts_of(unit):
    """Of a number, that are packed."""
    return 3 if unit == SPLIT else 1


@compiled
def block_product(unit, mode, m, n, k, a, lda, b, ldb, c, ldc, r, ldr, stage):
    """c from a (m, k) and b (k, n), both packed; between `units_open` and `units_close`."""
    parts, width = parts_of(unit), words(k)
    filled = k // SIDE * STEP + min(k % SIDE, STEP)  # words
    for j in range(0, n, SIDE):
        strip = at(b, j * ldb)
        if unit != DOTS:
            for i in range(0, m, SIDE):
                amx_block(parts, mode, m - i, n - j, width, at(a, i * lda), lda, strip,
                          at(c, i * ldc + j), ldc, at(r, i * ldr + j), ldr, stage)  # fmt: skip
        else:
            for i in range(0, m, TWO):
                dot_tile(mode, m - i, n - j, filled, at(a, i * lda), lda, 1, strip, SIDE,
                         at(c, i * ldc + j), ldc, at(r, i * ldr + j), ldr)  # fmt: skip


@compiled
def units_open(unit, stage):
    """Before the first product of a call: AMX's registers belong to the thread."""
    if unit != DOTS:
        tiles_open(stage)


@compiled
def units_close(unit, stage):
    """After the last."""
    if unit != DOTS:
        tiles_close(stage)


@compiled
def few_product(mode, m, n, k, a, packed, c, r, ldc, panel):
    """c (m, n) from a (m, k), rows end to end, and bt (n, k), which `packed` holds as `pack_rows`
    leaves it; rows of c and r lie `ldc` numbers apart. panel: m rows of words."""
    width = words(k)
    pack_rows(a, k, m, k, 1, panel)
    for j in range(0, n, lanes(c)):
        count = min(lanes(c), n - j)
        for i in range(m):
            s = dots_of(at(panel, i * width), at(packed, j * width), width, count, width)
            store_some(c, i * ldc + j, finished(mode, s, r, i * ldc + j, count), count)
