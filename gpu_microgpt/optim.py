"""Adam and AdamW over the flat buffers, with clipping by the global norm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from .backend import Backend
from .config import OptimizerConfig
from .ops import Ops
from .params import Params


class Optimizer:
    """The running moments, and the update of the weights.

    `norm` (1,) is the last gradient's norm before clipping; `scalars` (4,) float64 are what one
    update depends on: rate, the two bias corrections, the clip scale.
    """

    def __init__(self, config: OptimizerConfig, params: Params, backend: Backend) -> None:
        """Start with zero moments for these weights."""
        self.config, self.params, self.backend = config, params, backend
        self.m, self.v = Params(params.dims, backend), Params(params.dims, backend)
        self.norm = backend.zeros((1,), np.float64)
        self.scalars = backend.zeros((4,), np.float64)
        self.scalars[3] = 1

    def update(self, workers: Sequence[Ops], grads: Params, rate: float, step: int) -> None:
        """Update the weights with learning rate `rate`; `step` counts from 1.

        Each worker's operations take a stretch of the flat buffers, side by side.
        """
        c = self.config
        beta1, beta2 = c.betas
        self.scalars[:3] = rate, 1 - beta1**step, 1 - beta2**step
        workers[0].global_norm(self.norm, grads.flat)
        if c.grad_clip:
            workers[0].clip_scale(self.scalars[3:], self.norm, c.grad_clip)
        buffers = (self.params.flat, self.m.flat, self.v.flat, grads.flat)
        size = -(-len(grads.flat) // len(workers))

        def update(part: int) -> None:
            p, m, v, g = (b[part * size : (part + 1) * size] for b in buffers)
            ops = workers[part]
            ops.adamw(p, m, v, None, g, self.scalars, beta1, beta2, c.eps, c.weight_decay)

        self.backend.run([partial(update, part) for part in range(len(workers))])
