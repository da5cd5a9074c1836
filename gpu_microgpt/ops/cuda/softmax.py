"""Launchers of kernels/softmax.cu."""

from __future__ import annotations

import numpy as np

from ...types import Array
from .arrays import pointer, row_stride
from .context import ALIGN, WARP, Context, Grid, ceil_div, rows_of

WARP_WIDTH = 1024  # numbers of a row that a warp takes alone: 32 a thread
WARPS = 8  # of a block, with a row each
BLOCK = 512  # threads, at most, of a block that has a row together


def softmax(self: Context, y: Array, x: Array) -> None:
    """y = exp(x) / sum(exp(x)) over each row."""
    arrays = {"y": y, "x": x}
    rows_of("softmax", "x", x)
    self.check_rows("softmax", **{k: (a, self.real, x.shape) for k, a in arrays.items()})
    _launch(self, "softmax", (y, x))


def softmax_backward(self: Context, dx: Array, dy: Array, y: Array) -> None:
    """dx = y (dy - sum(dy y))."""
    arrays = {"dx": dx, "dy": dy, "y": y}
    rows_of("softmax_backward", "y", y)
    self.check_rows("softmax_backward", **{k: (a, self.real, y.shape) for k, a in arrays.items()})
    _launch(self, "softmax_backward", (dx, dy, y))


def _launch(self: Context, name: str, arrays: tuple[Array, ...]) -> None:
    rows, width = arrays[0].shape
    team, grid, block = teams(self, rows, width)
    kernel = self.kernel("softmax", f"{name}_{team}")
    strides = (np.int64(row_stride(a)) for a in arrays)
    vector = np.int32(in_packs(self, *arrays))
    kernel(grid, block, (*arrays, np.int32(rows), np.int32(width), *strides, vector))


def teams(self: Context, rows: int, width: int) -> tuple[str, Grid, Grid]:
    """Who shares a row of so many numbers, "warp" or "block", with the grid and the block."""
    if width > WARP_WIDTH:
        return "block", (rows,), (min(BLOCK, ceil_div(width, 8 * WARP) * WARP),)
    resident = self.device.multiprocessors * self.device.threads_per_multiprocessor // WARP // WARPS
    return "warp", (min(ceil_div(rows, WARPS), resident),), (WARPS * WARP,)


def in_packs(self: Context, *arrays: Array) -> bool:
    """Whether every row of (N, V) arrays starts at a multiple of 16 bytes."""
    return all(pointer(a) % ALIGN == 0 and row_stride(a) % self.pack == 0 for a in arrays)
