"""Launchers of kernels/relu.cu."""

from __future__ import annotations

import numpy as np

from ...types import Array
from .context import Context, Grid, ceil_div

BLOCK = 256


def relu(self: Context, y: Array, x: Array) -> None:
    """y = max(x, 0)."""
    self.check("relu", y=(y, self.real, x.shape), x=(x, self.real, x.shape))
    self.kernel("relu", "relu")(_grid(self, x), (BLOCK,), (y, x, np.int64(x.size)))


def relu_backward(self: Context, dx: Array, dy: Array, y: Array) -> None:
    """dx = dy where y > 0, else 0."""
    arrays = {"dx": dx, "dy": dy, "y": y}
    self.check("relu_backward", **{k: (a, self.real, y.shape) for k, a in arrays.items()})
    kernel = self.kernel("relu", "relu_backward")
    kernel(_grid(self, y), (BLOCK,), (dx, dy, y, np.int64(y.size)))


def _grid(self: Context, x: Array) -> Grid:
    """A thread for each pack of numbers; where they are many, as many as run at once."""
    resident = self.device.multiprocessors * self.device.threads_per_multiprocessor // BLOCK
    return (max(1, min(ceil_div(x.size, BLOCK * self.pack), resident)),)
