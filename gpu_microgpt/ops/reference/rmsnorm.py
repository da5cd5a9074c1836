"""RMSNorm without parameters (Zhang & Sennrich 2019): y = x / sqrt(mean(x^2) + eps)."""

from __future__ import annotations

from ...types import Array
from .context import Context, block_rows
from .embedding import embedding

EPS = 1e-5  # microgpt's, inside the root


def rmsnorm(self: Context, y: Array, rstd: Array, x: Array) -> None:
    """rstd = (mean(x^2) + eps)^(-1/2) a row; y = x rstd."""
    xp = self.xp
    xp.vecdot(x, x, out=rstd)
    rstd /= x.shape[1]
    rstd += EPS
    xp.sqrt(rstd, out=rstd)
    xp.divide(1, rstd, out=rstd)
    xp.multiply(x, rstd[:, None], out=y)


def embedding_rmsnorm(
    self: Context, y: Array, rstd: Array, tokens: Array, positions: Array, wte: Array, wpe: Array
) -> None:
    """rmsnorm(wte[tokens] + wpe[positions]); the sum is not kept."""
    embedding(self, y, tokens, positions, wte, wpe)
    rmsnorm(self, y, rstd, y)


def add_rmsnorm(
    self: Context, x: Array, y: Array, rstd: Array, branch: Array, residual: Array
) -> None:
    """x = residual + branch; y, rstd = rmsnorm(x). The gradient of x is that of both its terms."""
    self.xp.add(residual, branch, out=x)
    rmsnorm(self, y, rstd, x)


def rmsnorm_backward(self: Context, dx: Array, dy: Array, y: Array, rstd: Array) -> None:
    """dx = rstd (dy - y mean(dy y)).

    With r = rstd: y_i = x_i r and dr/dx_j = -r^3 x_j / C = -r^2 y_j / C. So
    dL/dx_j = sum_i dy_i (r [i=j] + x_i dr/dx_j) = r dy_j - r y_j (sum_i dy_i y_i) / C.
    """
    for rows in self.blocks(*y.shape):
        dx[rows] = _input_gradient(self, dy[rows], y[rows], rstd[rows])


def rmsnorm_backward_add(self: Context, dx: Array, dy: Array, y: Array, rstd: Array) -> None:
    """dx += rstd (dy - y mean(dy y)), as in rmsnorm_backward."""
    for rows in self.blocks(*y.shape):
        dx[rows] += _input_gradient(self, dy[rows], y[rows], rstd[rows])


def _input_gradient(self: Context, dy: Array, y: Array, rstd: Array) -> Array:
    """rstd (dy - y mean(dy y)), in scratch memory."""
    xp = self.xp
    gradient, mean = self.scratch(y.dtype, y.shape, rstd.shape)
    xp.vecdot(dy, y, out=mean)
    mean /= y.shape[1]
    xp.multiply(y, mean[:, None], out=gradient)
    xp.subtract(dy, gradient, out=gradient)
    gradient *= rstd[:, None]
    return gradient


def rmsnorm_scratch(rows: int, channels: int) -> tuple[tuple[int, ...], ...]:
    """Scratch shapes at most wanted here."""
    rows = block_rows(rows, channels)
    return ((rows, channels), (rows,))
