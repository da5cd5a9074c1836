"""Matrix product with weights stored (out, in): y = x w^T."""

from __future__ import annotations

from ...types import Array
from .context import Context
from .relu import relu, relu_backward


def linear(self: Context, y: Array, x: Array, w: Array) -> None:
    """y = x w^T."""
    self.xp.matmul(x, w.T, out=y)


def linear_add(self: Context, y: Array, x: Array, w: Array, residual: Array) -> None:
    """y = residual + x w^T."""
    self.xp.matmul(x, w.T, out=y)
    y += residual


def linear_backward(
    self: Context, dx: Array, dw: Array, dy: Array, x: Array, w: Array, add: bool
) -> None:
    """dx = dy w; dw = dy^T x, or dw += dy^T x.

    y_nf = sum_c x_nc w_fc, so dL/dx_nc = sum_f dy_nf w_fc and dL/dw_fc = sum_n dy_nf x_nc.
    """
    self.xp.matmul(dy, w, out=dx)
    if add:
        (product,) = self.scratch(w.dtype, w.shape)
        dw += self.xp.matmul(dy.T, x, out=product)
    else:
        self.xp.matmul(dy.T, x, out=dw)


def linear_relu(self: Context, y: Array, mask: Array, x: Array, w: Array) -> None:
    """y = max(x w^T, 0). The mask is for backends whose products write it: nothing is done here."""
    linear(self, y, x, w)
    relu(self, y, y)


def relu_linear_backward(
    self: Context, dx: Array, dw: Array, dy: Array, x: Array, mask: Array, w: Array, add: bool
) -> None:
    """dx = (dy w) [x > 0]; dw as linear_backward.

    y = x w^T with x = max(z, 0): dx is the gradient of z, which passes where x > 0. dw needs x
    alone, as x is the input of the product.
    """
    linear_backward(self, dx, dw, dy, x, w, add)
    relu_backward(self, dx, dx, x)
