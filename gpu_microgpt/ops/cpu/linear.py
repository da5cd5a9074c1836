"""Matrix product with weights stored (out, in): y = x w^T, and what is done with it on the way.

y (N, F), x (N, C), w (F, C), all with contiguous rows end to end. Per element 2 C FLOPs forward and
4 backward; the time is that of the FMAs, tile.py says how they are kept busy. The modes STORE, ADD,
RELU and KEEP are the tile's, so a residual, a relu or its mask costs no pass of its own.

- y = x w^T: the tile wants rows of w^T. So w is transposed, strip by strip of the outputs, and all
  rows of x pass by a strip while it is in the cache. For FEW rows that would cost more than it
  gives: there w is read in place, sums running along its rows.
- dx = dy w: the rows of w are what the tile wants. They are read in place where they are few and
  short, else packed strip by strip, so that a strip is one stretch of memory.
- dw = dy^T x: sums over rows, ROWS at a time, since x and dy in strides of their whole width miss
  the cache; dw is added to for each. Blocks of x and dy are packed where dw is wider than a strip.

NumPy's BLAS is not used: on one thread, at 114 and 1024 rows of 16 to 1536 inputs and outputs, it
is nowhere faster. That holds for arrays that begin at a cache line: else a tenth is lost. At 4 to 8
rows BLAS is up to 1.5 times as fast where there are 128 outputs, and a third as fast at 384 or 512:
no rule of shapes tells these apart, and the compiled step of generation could not call it.
"""

from __future__ import annotations

from functools import cache

from ...arena import Shape
from ...types import Array
from .code import VECTOR_BYTES
from .compile import compiled
from .dots import product_of_few
from .instructions import GRADIENTS, MULTIPLY, Instructions
from .tile import ADD, KEEP, RELU, STORE, STRIP, pack, pack_strip, product, product_packing
from .vector import at, lanes

# Measured with AVX-512, 48 KiB of L1 and 2 MiB of L2 cache
FEW = 12  # rows up to which packing w costs more than it gives, with many inputs ...
FEWEST, PER_ROW = 3, 16  # ... and with few: so many, and a row more for every so many inputs
SHORT = 256  # rows from which packing w for dx pays ...
NARROW = 512  # ... and inputs C from which it does for fewer rows too
ROWS = 128  # of x and dy for one addition to dw: a strip of x stays in L1
COLUMNS = 96  # of dy packed at a time, a multiple of the tile's rows


@compiled
def multiply(mode, N, F, C, y, x, w, r, panel, ld):
    """y = x w^T, by `mode` with r (N, F). panel: C rows of a strip.

    Rows of y and r begin `ld` numbers apart: F, or more where these are some of more outputs.
    """
    if min(FEW, FEWEST + C // PER_ROW) >= N:
        product_of_few(mode, N, F, C, at(x, 0), at(w, 0), at(y, 0), at(r, 0), ld)
    else:
        product_packing(mode, N, F, C, at(x, 0), C, 1, at(w, 0), 1, C, at(y, 0), ld, at(r, 0), ld,
                        at(panel, 0))  # fmt: skip


@compiled
def input_gradient(mode, N, F, C, dx, dy, w, r, panel):
    """dx = dy w, by `mode` with r (N, C). panel: F rows of a strip."""
    if N < SHORT and C <= NARROW and C % lanes(w) == 0:
        product(mode, N, C, F, at(dy, 0), F, 1, at(w, 0), C, at(dx, 0), C, at(r, 0), C)
    else:
        product_packing(mode, N, C, F, at(dy, 0), F, 1, at(w, 0), C, 1, at(dx, 0), C, at(r, 0), C,
                        at(panel, 0))  # fmt: skip


@compiled
def weight_gradient(N, F, C, dw, dy, x, add, panel, block):
    """dw = dy^T x, or dw += it. panel: ROWS rows of x, block: ROWS x COLUMNS of dy."""
    packs = STRIP * lanes(x) < C or C % lanes(x) > 0
    for n in range(0, N, ROWS):
        rows = min(ROWS, N - n)
        mode = ADD if add or n > 0 else STORE
        if not packs:
            c = at(dw, 0)
            product(mode, F, C, rows, at(dy, n * F), 1, F, at(x, n * C), C, c, C, c, C)
            continue
        pack(at(x, n * C), C, 1, rows, C, at(panel, 0))
        for f in range(0, F, COLUMNS):
            columns = min(COLUMNS, F - f)
            width = pack_strip(at(dy, n * F + f), F, rows, columns, at(block, 0))
            c = at(dw, f * C)
            product(mode, columns, C, rows, at(block, 0), 1, width, at(panel, 0), 0, c, C, c, C)


@compiled
def gradients(mode, N, F, C, dx, dw, dy, x, w, add, panel, block):
    """Both, x being what `mode` reads for dx."""
    input_gradient(mode, N, F, C, dx, dy, w, x, panel)
    weight_gradient(N, F, C, dw, dy, x, add, panel, block)


def linear(self: Instructions, y: Array, x: Array, w: Array) -> None:
    """y = x w^T."""
    _multiply(self, STORE, y, x, w, y)


def linear_add(self: Instructions, y: Array, x: Array, w: Array, residual: Array) -> None:
    """y = residual + x w^T."""
    _multiply(self, ADD, y, x, w, residual)


def linear_backward(
    self: Instructions, dx: Array, dw: Array, dy: Array, x: Array, w: Array, add: bool
) -> None:
    """dx = dy w; dw = dy^T x, or dw += dy^T x.

    y_nf = sum_c x_nc w_fc, so dL/dx_nc = sum_f dy_nf w_fc and dL/dw_fc = sum_n dy_nf x_nc.
    """
    _gradients(self, STORE, dx, dw, dy, x, w, add)


def linear_relu(self: Instructions, y: Array, mask: Array, x: Array, w: Array) -> None:
    """y = max(x w^T, 0). The mask is for backends that read it: here the output itself says it."""
    _multiply(self, RELU, y, x, w, y)


def relu_linear_backward(
    self: Instructions, dx: Array, dw: Array, dy: Array, x: Array, mask: Array, w: Array, add: bool
) -> None:
    """dx = (dy w) [x > 0]; dw as linear_backward.

    y = x w^T with x = max(z, 0): dx is the gradient of z, which passes where x > 0.
    """
    _gradients(self, KEEP, dx, dw, dy, x, w, add)


def _multiply(self: Instructions, mode: int, y: Array, x: Array, w: Array, r: Array) -> None:
    outputs, inputs = w.shape
    panel, _ = self.scratch(w.dtype, *self.linear_scratch(outputs, inputs, w.itemsize))
    sizes = (outputs, inputs)
    self.do(MULTIPLY, len(x), y, x, w, r, panel, mode, *sizes, self.unit, False)  # not packed


def _gradients(
    self: Instructions, mode: int, dx: Array, dw: Array, dy: Array, x: Array, w: Array, add: bool
) -> None:
    outputs, inputs = w.shape
    scratch = self.scratch(w.dtype, *self.linear_scratch(outputs, inputs, w.itemsize))
    sizes = (outputs, inputs)
    self.do(GRADIENTS, len(x), dx, dw, dy, x, w, *scratch, mode, *sizes, add, self.unit)


@cache
def linear_scratch(outputs: int, inputs: int, itemsize: int) -> tuple[Shape, ...]:
    """Scratch shapes of a linear: a panel of packed weights or inputs, a block of packed dy."""
    lanes = VECTOR_BYTES // itemsize
    strip = max(outputs, inputs) * STRIP * lanes
    whole = ROWS * -(-inputs // lanes) * lanes
    return (max(strip, whole),), (ROWS * COLUMNS,)
