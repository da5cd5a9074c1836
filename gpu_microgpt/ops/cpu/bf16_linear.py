"""linear.py's products on units of bfloat16: the same functions with the same arguments after
`unit`.

AMX or DOTS (AVX512_BF16): operands are rounded to bfloat16, sums are float32. SPLIT: operands are
three parts each (split.py), multiplied by AMX, and the product is float32's, or nearer; where it
would not pay, linear.py's. Operands become words on their way into packed blocks; x, w, dy stay
float32 where they lie, and so do all results.

- y = x w^T, dx = dy w: all of w is packed once a call, then x or dy some rows at a time.
- dw = dy^T x: sums over CHUNK rows; x is packed for them, dy in strips of OUTPUTS columns.
"""

from __future__ import annotations

from functools import cache

from ...arena import Shape

from .bf16 import (
    SIDE,
    STAGE,
    TILES,
    pack_columns,
    pack_rows,
    pack_strips,
    pack_strips_transposed,
    words,
)
from .bf16_product import block_product, few_product, parts_of, units_close, units_open
from .compile import compiled
from .instructions import SPLIT
from .linear import linear_scratch
from .relu import pass_positive, rectify
from .tile import ADD, KEEP, RELU, STORE
from .vector import at

LEAST = 1 << 20  # multiplications
SROWS = 32
SCHUNK = 128
SOUTPUTS = 32
DEPTH = 128
FEW = 12  # rows up to which packing w costs more than it gives
ROWS = 128  # of x or dy packed at a time
CHUNK = 256  # rows for one addition to dw
OUTPUTS = 64  # columns of dy packed at a time


@compiled
def rows_of(parts):
    return SROWS if parts == 3 else ROWS


@compiled
def chunk_of(parts):
    return SCHUNK if parts == 3 else CHUNK


@compiled
def outputs_of(parts):
    return SOUTPUTS if parts == 3 else OUTPUTS


@compiled
def pays(N, F, C):
    """Whether SPLIT is faster than linear.py: whether packing is little beside the products."""
    return N > FEW and N * F * C >= LEAST


@compiled
def _times_packed(unit, mode, N, K, n, y, x, packed, r, block, stage):
    """y (N, n) = x (N, K) times what is packed."""
    parts = parts_of(unit)
    width, step = parts * words(K), rows_of(parts)
    units_open(unit, stage)
    for i in range(0, N, step):
        rows = min(step, N - i)
        pack_rows(at(x, i * K), K, rows, K, parts, block)
        if parts == 1 or K <= DEPTH:
            block_product(unit, mode, rows, n, K, block, width, packed, width, at(y, i * n), n,
                          at(r, i * n), n, stage)  # fmt: skip
        else:
            _in_depth(unit, mode, rows, K, n, at(y, i * n), packed, at(r, i * n), block, stage)
    units_close(unit, stage)


@compiled
def _in_depth(unit, mode, rows, K, n, y, packed, r, block, stage):
    """Some rows of y, from DEPTH numbers of x at a time."""
    width = parts_of(unit) * words(K)
    for k in range(0, K, DEPTH):
        now = mode if mode == ADD else STORE
        start = k // SIDE * 3 * TILES
        block_product(unit, now if k == 0 else ADD, rows, n, min(DEPTH, K - k), at(block, start),
                      width, at(packed, start), width, y, n, r if k == 0 else y, n,
                      stage)  # fmt: skip
    if mode == RELU:
        rectify(rows * n, y, y)
    elif mode == KEEP:
        pass_positive(rows * n, y, y, r)


@compiled
def multiply(unit, mode, N, F, C, y, x, w, r, panel):
    """y = x w^T, by `mode` with r (N, F)."""
    if N <= FEW and unit != SPLIT:
        few_product(mode, N, F, C, at(x, 0), at(w, 0), at(y, 0), at(r, 0), at(panel, 0))
        return
    parts = parts_of(unit)
    block = at(panel, STAGE)
    packed = at(block, rows_of(parts) * parts * words(C))
    pack_strips_transposed(at(w, 0), C, C, F, parts, packed, panel)
    _times_packed(unit, mode, N, C, F, y, x, packed, r, block, at(panel, 0))


@compiled
def input_gradient(unit, mode, N, F, C, dx, dy, w, r, panel):
    """dx = dy w, by `mode` with r (N, C)."""
    parts = parts_of(unit)
    block = at(panel, STAGE)
    packed = at(block, rows_of(parts) * parts * words(F))
    pack_strips(at(w, 0), C, F, C, parts, packed)
    _times_packed(unit, mode, N, F, C, dx, dy, packed, r, block, at(panel, 0))


@compiled
def weight_gradient(unit, N, F, C, dw, dy, x, add, panel, block):
    """dw = dy^T x, or dw += it."""
    stage, packed, parts = at(panel, 0), at(panel, STAGE), parts_of(unit)
    units_open(unit, stage)
    chunk, outputs = chunk_of(parts), outputs_of(parts)
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
def bf16_scratch(outputs: int, inputs: int, itemsize: int = 4, parts: int = 1) -> tuple[Shape, ...]:
    """Scratch shapes of a linear, in float32: a panel of packed weights and rows of x or dy, or of
    rows of x; a block of packed dy."""

    def packed(k: int, n: int) -> int:
        """Words of b (k, n)."""
        return parts * -(-k // SIDE) * SIDE // 2 * -(-n // SIDE) * SIDE

    panel = max(
        packed(inputs, outputs) + packed(inputs, ROWS),
        packed(outputs, inputs) + packed(outputs, ROWS),
        packed(CHUNK, inputs),
    )
    return (STAGE + panel,), (packed(CHUNK, OUTPUTS),)


@cache
def split_scratch(outputs: int, inputs: int, itemsize: int) -> tuple[Shape, ...]:
    """Those of SPLIT, and of linear.py beside it."""
    mine = bf16_scratch(outputs, inputs, itemsize, 3)
    plain = linear_scratch(outputs, inputs, itemsize)
    return tuple(max(sizes) for sizes in zip(mine, plain, strict=True))
