"""Launchers of kernels/rmsnorm.cu."""

from __future__ import annotations

import numpy as np

from ...types import Array
from .context import WARP, Context, ceil_div, rows_of

WARPS_BLOCK = 128  # threads of a block whose warps take a row each
ROW_BLOCK = 256  # threads of a block that takes one row
MAX_HELD = 32  # numbers of a row that a thread holds
MAX_CHANNELS = ROW_BLOCK * MAX_HELD


def rmsnorm(self: Context, y: Array, rstd: Array, x: Array) -> None:
    """rstd = (mean(x^2) + eps)^(-1/2) a row; y = x rstd."""
    _check_rows(self, "rmsnorm", rstd, x=x, y=y)
    _launch(self, "rmsnorm", y, rstd, x, shape=x.shape)


def embedding_rmsnorm(
    self: Context, y: Array, rstd: Array, tokens: Array, positions: Array, wte: Array, wpe: Array
) -> None:
    """rmsnorm(wte[tokens] + wpe[positions]); the sum stays in registers."""
    rows, channels = rows_of("embedding_rmsnorm", "y", y)
    _check_rows(self, "embedding_rmsnorm", rstd, y=y)
    self.check(
        "embedding_rmsnorm",
        tokens=(tokens, "int32", (rows,)),
        positions=(positions, "int32", (rows,)),
        wte=(wte, self.real, (len(wte), channels)),
        wpe=(wpe, self.real, (len(wpe), channels)),
    )
    _launch(self, "embedding_rmsnorm", y, rstd, tokens, positions, wte, wpe, shape=y.shape)


def add_rmsnorm(
    self: Context, x: Array, y: Array, rstd: Array, branch: Array, residual: Array
) -> None:
    """x = residual + branch; y, rstd = rmsnorm(x)."""
    _check_rows(self, "add_rmsnorm", rstd, x=x, y=y, branch=branch, residual=residual)
    _launch(self, "add_rmsnorm", x, y, rstd, branch, residual, shape=x.shape)


def rmsnorm_backward(self: Context, dx: Array, dy: Array, y: Array, rstd: Array) -> None:
    """dx = rstd (dy - y mean(dy y))."""
    _check_rows(self, "rmsnorm_backward", rstd, y=y, dx=dx, dy=dy)
    _launch(self, "rmsnorm_backward", dx, dy, y, rstd, shape=y.shape)


def rmsnorm_backward_add(self: Context, dx: Array, dy: Array, y: Array, rstd: Array) -> None:
    """dx += rstd (dy - y mean(dy y))."""
    _check_rows(self, "rmsnorm_backward_add", rstd, y=y, dx=dx, dy=dy)
    _launch(self, "rmsnorm_backward_add", dx, dy, y, rstd, shape=y.shape)


def _check_rows(self: Context, op: str, rstd: Array, **arrays: Array) -> None:
    """All as the first of the arrays, which are (N, C); rstd (N,)."""
    first, shape = next((name, array.shape) for name, array in arrays.items())
    if len(shape) != 2 or not 1 <= shape[1] <= MAX_CHANNELS:
        raise ValueError(f"{op}: {first}: got {shape}, wanted rows of 1 to {MAX_CHANNELS} channels")
    self.check(op, **{name: (array, self.real, shape) for name, array in arrays.items()})
    self.check(op, rstd=(rstd, "float32", shape[:1]))


def _launch(self: Context, name: str, *arrays: Array, shape: tuple[int, int]) -> None:
    """A team of threads for each row."""
    rows, channels = shape
    constants = _form(channels, self.pack)
    team = constants["TEAM"]
    block = WARPS_BLOCK if team == WARP else ROW_BLOCK
    grid = max(1, ceil_div(rows * team, block))
    kernel = self.kernel("rmsnorm", name, **constants)
    kernel((grid,), (block,), (*arrays, np.int32(rows), np.int32(channels)))


def _form(channels: int, pack: int) -> dict[str, int]:
    """Who holds a row. Of the forms that can, one of few: each is a compilation of its own."""
    packed = channels % pack == 0
    if channels <= WARP * MAX_HELD:
        step = 8 * WARP
        return {
            "TEAM": WARP,
            "HELD": 8 * ceil_div(channels, step) if packed else MAX_HELD,
            "PACKED": int(packed),
        }
    few = packed and channels <= 8 * ROW_BLOCK
    return {"TEAM": ROW_BLOCK, "HELD": 8 if few else MAX_HELD, "PACKED": int(packed)}
