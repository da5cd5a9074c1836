"""Adam and AdamW over the flat buffers, with clipping by the global norm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .backend import Backend
from .config import OptimizerConfig
from .ops import Ops
from .params import Params, Weights


class Optimizer:
    """The running moments, and the update of the weights.

    `norm` (1,) is the last gradient's norm before clipping; `scalars` (4,) float64 are what one
    update depends on: rate, the two bias corrections, the clip scale.
    """

    def __init__(self, config: OptimizerConfig, params: Weights, backend: Backend) -> None:
        """Start with zero moments for these weights."""
        self.config, self.params, self.backend = config, params, backend
        self.m, self.v = Params(params.dims, backend), Params(params.dims, backend)
        self.norm = backend.zeros((1,), np.float64)
        self.scalars = backend.from_host(np.array([0.0, 0.0, 0.0, 1.0]))

    def update(self, workers: Sequence[Ops], grads: Params, rate: float, step: int) -> None:
        """Update the weights with learning rate `rate`; `step` counts from 1.

        Each worker's operations take a stretch of the flat buffers, side by side.
        """
        self.scalars[:3] = self.rates(np.array([rate]), np.array([step]))[0]
        self.measure(workers[0], grads)
        parts = self.parts(len(workers))
        self.backend.run([
            partial(self.apply, ops, grads, part) for ops, part in zip(workers, parts, strict=True)
        ])  # fmt: skip

    def parts(self, count: int) -> list[slice]:
        """The flat buffers in so many stretches."""
        size = -(-len(self.params.flat) // count)
        return [slice(i * size, (i + 1) * size) for i in range(count)]

    def rates(
        self, rates: np.ndarray[Any, Any], steps: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """What `scalars` begin with in these steps, (n,) each, (n, 3): rate, bias corrections."""
        beta1, beta2 = self.config.betas
        return np.stack([rates, 1 - beta1**steps, 1 - beta2**steps], axis=1)

    def measure(self, ops: Ops, grads: Params) -> None:
        """Take the norm, and where clipping is wanted its scale."""
        ops.global_norm(self.norm, grads.flat)
        if self.config.grad_clip:
            ops.clip_scale(self.scalars[3:], self.norm, self.config.grad_clip)

    def apply(self, ops: Ops, grads: Params, part: slice = slice(None)) -> None:
        """Update that part of the weights by `scalars` as they are."""
        c, copy = self.config, self.params.copy
        params, m, v, g = (x.flat[part] for x in (self.params, self.m, self.v, grads))
        rounded = None if copy is None else copy.flat[part]
        ops.adamw(params, m, v, rounded, g, self.scalars, *c.betas, c.eps, c.weight_decay)
