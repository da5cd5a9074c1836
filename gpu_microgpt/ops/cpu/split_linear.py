"""linear.py's products where AMX may multiply float32: in three parts (split.py) where that is
faster, else as linear.py has them. Either way they are float32's.
"""

from __future__ import annotations

from functools import cache

from ...arena import Shape
from . import bf16_linear as parted
from .bf16 import SIDE, STAGE, packed_words
from .bf16_linear import DEPTH
from .compile import compiled
from .instructions import SPLIT
from .linear import input_gradient as plain_input_gradient
from .linear import linear_scratch
from .linear import multiply as plain_multiply
from .linear import weight_gradient as plain_weight_gradient

WIDE = 96  # rows and columns from which a product pays for packing its operands, ...
LONG = 32  # ... sums of fewer terms being filled up with zeros


@compiled
def pays(m, n, k):
    """Whether a (m, k) times b (k, n) is faster in parts: a number of a is used n times, of b m."""
    return min(m, n) >= WIDE and k >= LONG


@compiled
def multiply(mode, N, F, C, y, x, w, r, panel, ld):
    """y = x w^T, by `mode` with r (N, F), whose rows and those of y begin `ld` numbers apart: of so
    many outputs in all these are some, and the choice does not depend on how many."""
    if pays(N, ld, C):
        parted.multiply(SPLIT, mode, N, F, C, y, x, w, r, panel, ld)
    else:
        plain_multiply(mode, N, F, C, y, x, w, r, panel, ld)


@compiled
def gradients(mode, N, F, C, dx, dw, dy, x, w, add, panel, block):
    """dx = dy w, by `mode` with x; dw = dy^T x, or dw += it."""
    if pays(N, C, F):
        parted.input_gradient(SPLIT, mode, N, F, C, dx, dy, w, x, panel)
    else:
        plain_input_gradient(mode, N, F, C, dx, dy, w, x, panel)
    if pays(F, C, N):
        parted.weight_gradient(SPLIT, N, F, C, dw, dy, x, add, panel, block)
    else:
        plain_weight_gradient(N, F, C, dw, dy, x, add, panel, block)


@cache
def split_scratch(outputs: int, inputs: int, itemsize: int) -> tuple[Shape, ...]:
    """Scratch shapes of either: a panel of packed weights and of some rows of x or dy, or of rows
    of x; a block of packed dy."""
    block = 3 * packed_words(DEPTH, SIDE)
    panel = STAGE + block + 3 * max(
        packed_words(inputs, outputs), packed_words(outputs, inputs), packed_words(DEPTH, inputs)
    )  # fmt: skip
    (plain,), (plain_block,) = linear_scratch(outputs, inputs, itemsize)
    return (max(panel, plain),), (max(block, plain_block),)
