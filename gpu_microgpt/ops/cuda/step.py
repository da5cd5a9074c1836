"""Launchers of kernels/step.cu: a training step's counts, rate and records, kept on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...config import Config
from ...schedule import warmup_steps
from ...types import Array
from .context import Context, rows_of

SCHEDULES = {"constant": 0, "linear": 1, "cosine": 2}  # step.cu has the same
WORD, DOUBLE = 4, 8  # bytes of an int32, of a float64 or int64, which may start at any of them


@dataclass(frozen=True)
class UpdatePlan:
    """What every update of a run has in common."""

    grad_accum: int  # micro-batches a step
    total_steps: int
    schedule: str  # a name in SCHEDULES
    warmup: int  # steps
    lr: float
    min_lr: float
    beta1: float
    beta2: float
    max_norm: float  # 0: no clipping

    @classmethod
    def of(cls, config: Config, total_steps: int) -> UpdatePlan:
        """The configured optimizer and schedule over so many steps."""
        optimizer, schedule = config.optimizer, config.schedule
        return cls(
            config.train.grad_accum,
            total_steps,
            schedule.name,
            warmup_steps(schedule, total_steps),
            optimizer.lr,
            schedule.min_lr,
            *optimizer.betas,
            optimizer.grad_clip,
        )


def advance(self: Context, counter: Array, targets: Array, count: Array) -> None:
    """counter += 1, targets += count, behind a micro-batch of `count` targets.

    counter, targets (1,) int64; count (1,) int32.
    """
    arrays = {"counter": counter, "targets": targets}
    self.check("advance", DOUBLE, **{k: (a, "int64", (1,)) for k, a in arrays.items()})
    self.check("advance", WORD, count=(count, "int32", (1,)))
    self.kernel("step", "advance")((1,), (1,), (counter, targets, count))


def update_scalars(
    self: Context, scalars: Array, records: Array, loss: Array, targets: Array, norm: Array,
    counter: Array, plan: UpdatePlan,
) -> None:  # fmt: skip
    """What `adamw` needs for step s = counter / grad_accum, which counts from 1, and its record.

    scalars (4,) = rate, 1 - beta1^s, 1 - beta2^s, clip / targets; records (ring, 3): row s % ring
    = mean loss, norm of the mean gradient, targets; loss (1,), the sum over the step's targets,
    and targets (1,) int64 become 0. norm (1,): of the summed gradients. counter (1,) int64: behind
    the step's last micro-batch. All else float64.

    Without targets: rate and clip are 0, so that weights stay; recorded loss and norm are NaN.
    """
    op, ring = "update_scalars", rows_of("update_scalars", "records", records)[0]
    self.check(
        op,
        DOUBLE,
        scalars=(scalars, "float64", (4,)),
        records=(records, "float64", (max(1, ring), 3)),
        loss=(loss, "float64", (1,)),
        targets=(targets, "int64", (1,)),
        norm=(norm, "float64", (1,)),
        counter=(counter, "int64", (1,)),
    )
    steps = (np.int64(n) for n in (plan.grad_accum, plan.total_steps, plan.warmup))
    rates = (plan.lr, plan.min_lr, plan.beta1, plan.beta2, plan.max_norm)
    self.kernel("step", op)((1,), (2,), (
        scalars, records, loss, targets, norm, counter, np.int32(ring), *steps,
        np.int32(SCHEDULES[plan.schedule]), *(np.float64(x) for x in rates),
    ))  # fmt: skip
