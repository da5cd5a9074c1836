"""linear.py's products with operands rounded to bfloat16 and float32 sums.

The same functions with the same arguments after `unit`: AMX, or DOTS for AVX512_BF16. Operands are
rounded on their way into packed blocks; x, w, dy stay float32 where they
lie, and so do all results.

- y = x w^T, dx = dy w: all of w is packed once a call, then x or dy some rows at a time. For y it
  may also have been packed before (`multiply_packed`).
- dw = dy^T x: sums over CHUNK rows; x is packed for them, dy in strips of OUTPUTS columns.
"""

from __future__ import annotations

from functools import cache

from ...arena import Shape
from .bf16 import SIDE, pack_columns, pack_rows, pack_strips, pack_strips_transposed, words
from .bf16_product import STAGE, block_product, few_product, units_close, units_open
from .compile import compiled
from .tile import ADD, STORE
from .vector import at

FEW = 12  # rows up to which packing w costs more than it gives
ROWS = 128  # of x or dy packed at a time
CHUNK = 256  # rows for one addition to dw
OUTPUTS = 64  # columns of dy packed at a time


@compiled
def pack_weights(N, w, F, C, p):
    """w (F, C) for y = x w^T of N rows; output f begins at f words(C) if it is one in 32."""
    if N <= FEW:
        pack_rows(at(w, 0), C, F, C, p)
    else:
        pack_strips_transposed(at(w, 0), C, C, F, p)


@compiled
def pack_weights_back(w, F, C, p):
    """w (F, C) for dx = dy w."""
    pack_strips(at(w, 0), C, F, C, p)


@compiled
def _times_packed(unit, mode, N, K, n, y, x, packed, r, block, stage, ld):
    """y (N, n) = x (N, K) times what is packed; rows of y and r begin `ld` numbers apart."""
    units_open(unit, stage)
    for i in range(0, N, ROWS):
        rows = min(ROWS, N - i)
        pack_rows(at(x, i * K), K, rows, K, block)
        block_product(unit, mode, rows, n, K, block, words(K), packed, words(K), at(y, i * ld), ld,
                      at(r, i * ld), ld, stage)  # fmt: skip
    units_close(unit, stage)


@compiled
def multiply(unit, mode, N, F, C, y, x, w, r, panel, ld):
    """y = x w^T, by `mode` with r (N, F), whose rows and those of y begin `ld` numbers apart."""
    packed = at(panel, STAGE + ROWS * words(C))
    pack_weights(N, w, F, C, packed)
    multiply_packed(unit, mode, N, F, C, y, x, packed, r, panel, ld)


@compiled
def multiply_packed(unit, mode, N, F, C, y, x, packed, r, panel, ld):
    """The same with w as `pack_weights` has left it."""
    if N <= FEW:
        few_product(mode, N, F, C, at(x, 0), at(packed, 0), at(y, 0), at(r, 0), ld, at(panel, 0))
    else:
        _times_packed(unit, mode, N, C, F, y, x, packed, r, at(panel, STAGE), at(panel, 0), ld)


@compiled
def input_gradient(unit, mode, N, F, C, dx, dy, w, r, panel):
    """dx = dy w, by `mode` with r (N, C)."""
    block = at(panel, STAGE)
    packed = at(block, ROWS * words(F))
    pack_weights_back(w, F, C, packed)
    _times_packed(unit, mode, N, F, C, dx, dy, packed, r, block, at(panel, 0), C)


@compiled
def weight_gradient(unit, N, F, C, dw, dy, x, add, panel, block):
    """dw = dy^T x, or dw += it."""
    stage, packed = at(panel, 0), at(panel, STAGE)
    units_open(unit, stage)
    for i in range(0, N, CHUNK):
        rows = min(CHUNK, N - i)
        mode = ADD if add or i > 0 else STORE
        pack_strips(at(x, i * C), C, rows, C, packed)
        for f in range(0, F, OUTPUTS):
            columns = min(OUTPUTS, F - f)
            pack_columns(at(dy, i * F + f), F, columns, rows, at(block, 0))
            c = at(dw, f * C)
            block_product(unit, mode, columns, C, rows, at(block, 0), words(rows), packed,
                          words(rows), c, C, c, C, stage)  # fmt: skip
    units_close(unit, stage)


@compiled
def gradients(unit, mode, N, F, C, dx, dw, dy, x, w, add, panel, block):
    """Both, x being what `mode` reads for dx."""
    input_gradient(unit, mode, N, F, C, dx, dy, w, x, panel)
    weight_gradient(unit, N, F, C, dw, dy, x, add, panel, block)


@cache
def bf16_scratch(outputs: int, inputs: int, itemsize: int = 4) -> tuple[Shape, ...]:
    """Scratch shapes of a linear, in float32: a panel of packed weights and rows of x or dy, or of
    rows of x; a block of packed dy."""

    def packed(k: int, n: int) -> int:
        """Words of b (k, n)."""
        return -(-k // SIDE) * SIDE // 2 * -(-n // SIDE) * SIDE

    panel = max(
        packed(inputs, outputs) + packed(inputs, ROWS),
        packed(outputs, inputs) + packed(outputs, ROWS),
        packed(CHUNK, inputs),
    )
    return (STAGE + panel,), (packed(CHUNK, OUTPUTS),)
