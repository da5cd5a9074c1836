"""linear.py's products on units of bfloat16: the same functions with the same arguments after
`unit`.

AMX or DOTS (AVX512_BF16): operands are rounded to bfloat16, sums are float32. SPLIT: operands are
three parts each (split.py), multiplied by AMX, and the product is float32's, or nearer. Operands
become words on their way into packed blocks; x, w, dy stay float32 where they lie, and so do all
results.

- y = x w^T, dx = dy w: all of w is packed once a call, then x or dy some rows at a time; for y it
  may also have been packed before (`multiply_packed`). Of three parts SIDE rows, DEPTH numbers of
  each: that block stays in L1 while w passes by, and w, DEPTH of its numbers, in L2 while ROWS rows
  do.
- dw = dy^T x: sums over CHUNK rows; x is packed for them, dy in strips of OUTPUTS columns. Of three
  parts DEPTH rows and SIDE columns.
"""

from __future__ import annotations

from functools import cache

from ...arena import Shape
from .amx import MORE
from .bf16 import (
    SIDE,
    STAGE,
    TILES,
    pack_columns,
    pack_rows,
    pack_strips,
    pack_strips_transposed,
    packed_words,
    words,
)
from .bf16_product import block_product, few_product, parts_of, units_close, units_open
from .compile import compiled
from .instructions import SPLIT
from .tile import ADD, STORE
from .vector import at

FEW = 12  # rows up to which packing w costs more than it gives
ROWS = 128  # of x or dy packed at a time
CHUNK = 256  # rows for one addition to dw
OUTPUTS = 64  # columns of dy packed at a time
DEPTH = 128  # terms of a sum at a time, of three parts: a block of 32 rows is 24 KiB


@compiled
def _block(unit, K):
    """Rows of x that are packed at a time, and numbers of each."""
    return (SIDE, DEPTH) if unit == SPLIT else (ROWS, K)


@compiled
def _few(unit, N):
    """Whether so many rows are too few for packing w in strips."""
    return N <= FEW and unit != SPLIT


@compiled
def pack_weights(unit, N, w, F, C, p, stage):
    """w (F, C) for y = x w^T of N rows; output f begins at f words(C) if it is one in 32."""
    if _few(unit, N):
        pack_rows(at(w, 0), C, F, C, 1, p)
    else:
        pack_strips_transposed(at(w, 0), C, C, F, parts_of(unit), p, stage)


@compiled
def _mode(mode, more, after):
    """Of a product that others in the same sum go before (`more`), or come after."""
    if mode == ADD:
        return ADD
    return (STORE if after else mode) + (MORE if more else 0)


@compiled
def _times_packed(unit, mode, N, K, n, y, x, packed, r, block, stage, ld):
    """y (N, n) = x (N, K) times what is packed; rows of y and r begin `ld` numbers apart."""
    parts = parts_of(unit)
    width = parts * words(K)
    step, depth = _block(unit, K)
    units_open(unit, stage)
    for group in range(0, N, ROWS):
        end = min(N, group + ROWS)
        for k in range(0, K, depth):
            deep, some = min(depth, K - k), at(packed, k // SIDE * parts * TILES)
            for i in range(group, end, step):
                rows, c, old = min(step, end - i), at(y, i * ld), at(r, i * ld)
                pack_rows(at(x, i * K + k), K, rows, deep, parts, block)
                now = _mode(mode, k > 0, k + depth < K)
                block_product(unit, now, rows, n, deep, block, parts * words(deep), some, width, c,
                              ld, c if k > 0 and mode == ADD else old, ld, stage)  # fmt: skip
    units_close(unit, stage)


@compiled
def multiply(unit, mode, N, F, C, y, x, w, r, panel, ld):
    """y = x w^T, by `mode` with r (N, F), whose rows and those of y begin `ld` numbers apart."""
    step, depth = _block(unit, C)
    packed = at(panel, STAGE + step * parts_of(unit) * words(depth))
    pack_weights(unit, N, w, F, C, packed, at(panel, 0))
    multiply_packed(unit, mode, N, F, C, y, x, packed, r, panel, ld)


@compiled
def multiply_packed(unit, mode, N, F, C, y, x, packed, r, panel, ld):
    """The same with w as `pack_weights` has left it."""
    if _few(unit, N):
        few_product(mode, N, F, C, at(x, 0), at(packed, 0), at(y, 0), at(r, 0), ld, at(panel, 0))
    else:
        _times_packed(unit, mode, N, C, F, y, x, packed, r, at(panel, STAGE), at(panel, 0), ld)


@compiled
def input_gradient(unit, mode, N, F, C, dx, dy, w, r, panel):
    """dx = dy w, by `mode` with r (N, C)."""
    parts = parts_of(unit)
    block = at(panel, STAGE)
    step, depth = _block(unit, F)
    packed = at(block, step * parts * words(depth))
    pack_strips(at(w, 0), C, F, C, parts, packed)
    _times_packed(unit, mode, N, F, C, dx, dy, packed, r, block, at(panel, 0), C)


@compiled
def weight_gradient(unit, N, F, C, dw, dy, x, add, panel, block):
    """dw = dy^T x, or dw += it."""
    stage, packed, parts = at(panel, 0), at(panel, STAGE), parts_of(unit)
    units_open(unit, stage)
    chunk, outputs = (DEPTH, SIDE) if unit == SPLIT else (CHUNK, OUTPUTS)
    for i in range(0, N, chunk):
        rows = min(chunk, N - i)
        mode, width = ADD if add or i > 0 else STORE, parts * words(rows)
        pack_strips(at(x, i * C), C, rows, C, parts, packed)
        for f in range(0, F, outputs):
            columns = min(outputs, F - f)
            pack_columns(at(dy, i * F + f), F, columns, rows, parts, at(block, 0), stage)
            c = at(dw, f * C)
            block_product(unit, mode, columns, C, rows, at(block, 0), width, packed, width, c, C,
                          c, C, stage)  # fmt: skip
    units_close(unit, stage)


@compiled
def gradients(unit, mode, N, F, C, dx, dw, dy, x, w, add, panel, block):
    """Both, x being what `mode` reads for dx."""
    input_gradient(unit, mode, N, F, C, dx, dy, w, x, panel)
    weight_gradient(unit, N, F, C, dw, dy, x, add, panel, block)


@cache
def bf16_scratch(outputs: int, inputs: int, itemsize: int) -> tuple[Shape, ...]:
    """Scratch shapes of a linear, in float32: a panel of packed weights and rows of x or dy, or of
    rows of x; a block of packed dy."""
    panel = max(
        packed_words(inputs, outputs) + packed_words(inputs, ROWS),
        packed_words(outputs, inputs) + packed_words(outputs, ROWS),
        packed_words(CHUNK, inputs),
    )
    return (STAGE + panel,), (packed_words(CHUNK, OUTPUTS),)
