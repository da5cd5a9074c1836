"""Matrix products with weights stored (out, in): y = x w^T, by cuBLASLt."""

from __future__ import annotations

from collections.abc import Callable

from ...types import Array
from .arrays import pointer
from .context import Context, ceil_div, rows_of
from .cublaslt import Epilogue
from .gemm import After, Gemm
from .relu import relu, relu_backward

MASK_BITS = 128  # the library wants each row of a mask to start at a multiple of so many


def relu_mask_bytes(width: int) -> int:
    """Bytes a row of the mask that `linear_relu` writes for rows of `width` numbers."""
    return ceil_div(width, MASK_BITS) * MASK_BITS // 8


def linear(self: Context, y: Array, x: Array, w: Array) -> None:
    """y = x w^T."""
    _check(self, "linear", x, w, y=y)
    _gemm(self, "linear").multiply(y, x, w, transpose_b=True)


def linear_add(self: Context, y: Array, x: Array, w: Array, residual: Array) -> None:
    """y = residual + x w^T."""
    _check(self, "linear_add", x, w, y=y, residual=residual)
    if pointer(y) == pointer(residual):
        raise ValueError("linear_add: residual: got y, wanted another array")
    _gemm(self, "linear_add").multiply(y, x, w, transpose_b=True, c=residual)


def linear_backward(
    self: Context, dx: Array, dw: Array, dy: Array, x: Array, w: Array, add: bool
) -> None:
    """dx = dy w; dw = dy^T x, or dw += dy^T x, in float32 whatever the others are."""
    _check_backward(self, "linear_backward", dx, dw, dy, x, w)
    _gemm(self, "linear_backward").multiply(dx, dy, w)
    _weights_gradient(self, "linear_backward", dw, dy, x, add)


def linear_relu(self: Context, y: Array, mask: Array, x: Array, w: Array) -> None:
    """y = max(x w^T, 0), in one where the library can and that is faster.

    Only then are the mask's bits written. It may have no columns: then none are wanted. Done in
    one, a NaN of the product becomes zero; a NaN in x is still seen in the residual stream.
    """
    op = "linear_relu"
    n, f = _check(self, op, x, w, y=y)
    _check_mask(self, op, mask, n, f)
    gemm = _gemm(self, op)
    kept = mask.shape[1] > 0
    after = After(Epilogue.RELU_AUX, mask) if kept else After(Epilogue.RELU)
    fused = gemm.product(y, x, w, transpose_b=True, after=after)

    def plain() -> None:
        gemm.multiply(y, x, w, transpose_b=True)
        relu(self, y, y)

    done_in_one = _faster(gemm, f"{op} {after.epilogue.name} {n} {f} {w.shape[1]}", plain, fused)
    if kept:
        note = gemm.masks.add if done_in_one else gemm.masks.discard
        note(pointer(mask))


def relu_linear_backward(
    self: Context, dx: Array, dw: Array, dy: Array, x: Array, mask: Array, w: Array, add: bool
) -> None:
    """dx = (dy w) [x > 0]; dw as linear_backward.

    By the mask's bits, in one with the product, where the last linear_relu into this mask wrote
    them and that is faster; else by x.
    """
    op = "relu_linear_backward"
    n, c = _check_backward(self, op, dx, dw, dy, x, w)
    _check_mask(self, op, mask, n, c)
    gemm = _gemm(self, op)
    written = mask.shape[1] > 0 and pointer(mask) in gemm.masks
    fused = gemm.product(dx, dy, w, after=After(Epilogue.DRELU, mask)) if written else None

    def plain() -> None:
        gemm.multiply(dx, dy, w)
        relu_backward(self, dx, dx, x)

    _faster(gemm, f"{op} {n} {c} {w.shape[0]}", plain, fused)
    _weights_gradient(self, op, dw, dy, x, add)


def _faster(
    gemm: Gemm, name: str, plain: Callable[[], None], fused: Callable[[], None] | None
) -> bool:
    """Do the faster of the two; whether that was `fused`, which may not be there."""
    chosen = fused is not None and gemm.fastest(name, (plain, fused)) == 1
    if fused is not None and chosen:
        fused()
    else:
        plain()
    return chosen


def _weights_gradient(self: Context, op: str, dw: Array, dy: Array, x: Array, add: bool) -> None:
    _gemm(self, op).multiply(dw, dy, x, transpose_a=True, c=dw if add else None)


def _gemm(self: Context, op: str) -> Gemm:
    if self.gemm is None:
        raise ValueError(f"{op}: got operations without matrix products, wanted gemm= given")
    return self.gemm


def _check(self: Context, op: str, x: Array, w: Array, **out: Array) -> tuple[int, int]:
    """x (N, C), w (F, C) and arrays (N, F); returns N and F."""
    n, c = rows_of(op, "x", x)
    f, _ = rows_of(op, "w", w)
    outs = {name: (array, self.real, (n, f)) for name, array in out.items()}
    self.check_rows(op, **outs, x=(x, self.real, (n, c)), w=(w, self.real, (f, c)))
    return n, f


def _check_backward(
    self: Context, op: str, dx: Array, dw: Array, dy: Array, x: Array, w: Array
) -> tuple[int, int]:
    """dx, x (N, C), dw, w (F, C), dy (N, F); returns N and C."""
    n, _ = _check(self, op, x, w, dy=dy)
    self.check_rows(op, dx=(dx, self.real, x.shape), dw=(dw, "float32", w.shape))
    return n, int(x.shape[1])


def _check_mask(self: Context, op: str, mask: Array, rows: int, width: int) -> None:
    """Of no columns, or of the bytes that `relu_mask_bytes` says."""
    columns = rows_of(op, "mask", mask)[1] and relu_mask_bytes(width)
    self.check(op, mask=(mask, "uint8", (rows, columns)))
