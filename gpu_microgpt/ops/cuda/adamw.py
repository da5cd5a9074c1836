"""Launchers of kernels/adamw.cu."""

from __future__ import annotations

import numpy as np

from ...arena import Shape
from ...types import Array
from .context import NULL, Context, ceil_div
from .device import Device

BLOCK = 256
RESIDENT = 6  # blocks that a multiprocessor holds at once, at 40 registers a thread
SUM_BLOCK = 1024
DOUBLE = 8  # bytes of a float64, which may start at any of them


def global_norm(self: Context, norm: Array, grads: Array) -> None:
    """norm = sqrt(sum(grads^2)); its bits depend on the device and the size only."""
    self.check("global_norm", DOUBLE, norm=(norm, "float64", (1,)))
    self.check("global_norm", grads=(grads, "float32", (grads.size,)))
    (part,) = self.scratch(np.float64, *adamw_scratch(self.device, grads.size))
    size = np.int64(grads.size)
    self.kernel("adamw", "sum_squares")(part.shape, (BLOCK,), (part, grads, size))
    root = self.kernel("adamw", "root_of_sum")
    root((1,), (SUM_BLOCK,), (norm, part, np.int32(part.size)))


def clip_scale(self: Context, scale: Array, norm: Array, max_norm: float) -> None:
    """scale = min(1, max_norm / norm)."""
    arrays = {"scale": scale, "norm": norm}
    self.check("clip_scale", DOUBLE, **{k: (a, "float64", (1,)) for k, a in arrays.items()})
    self.kernel("adamw", "clip_scale")((1,), (1,), (scale, norm, np.float64(max_norm)))


def adamw(
    self: Context, params: Array, m: Array, v: Array, copy: Array | None, grads: Array,
    scalars: Array, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One step of Adam with decoupled weight decay, the reference's formula."""
    shape = (params.size,)
    arrays = {"params": params, "m": m, "v": v, "grads": grads}
    self.check("adamw", **{k: (a, "float32", shape) for k, a in arrays.items()})
    self.check("adamw", DOUBLE, scalars=(scalars, "float64", (4,)))
    if copy is not None:
        if self.real != "bfloat16":
            raise ValueError(f"adamw: copy: got {copy.dtype} {copy.shape}, wanted None in float32")
        self.check("adamw", copy=(copy, "bfloat16", shape))
    numbers = (np.float64(x) for x in (beta1, beta2, eps, weight_decay))
    args = (params, m, v, NULL if copy is None else copy, grads, scalars, np.int64(params.size))
    kernel = self.kernel("adamw", "adamw")
    kernel((_blocks(self.device, params.size),), (BLOCK,), (*args, *numbers))


def _blocks(device: Device, size: int) -> int:
    """A thread for every four numbers; where they are many, as many as run at once."""
    resident = min(RESIDENT, device.threads_per_multiprocessor // BLOCK)
    return max(1, min(ceil_div(size, BLOCK * 4), device.multiprocessors * resident))


def adamw_scratch(device: Device, size: int) -> tuple[Shape, ...]:
    """Scratch shapes, in float64, at most wanted here for flat buffers of `size` numbers."""
    return ((_blocks(device, size),),)
