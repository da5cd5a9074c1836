"""Learning-rate schedules: a linear warm-up, then constant, linear or cosine."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from .config import ScheduleConfig

Steps: TypeAlias = "int | np.ndarray[Any, Any]"


def warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Steps w over which the rate rises to its peak."""
    return round(schedule.warmup_fraction * total_steps)


def learning_rate(schedule: ScheduleConfig, lr: float, step: Steps, total_steps: int) -> Any:
    """Learning rate of step `step`, 0 <= step < total_steps, for the peak rate `lr`; of an array of
    steps an array, float64. With w steps of warm-up:

        step <  w:  lr * (step + 1) / w
        step >= w:  min_lr + (lr - min_lr) * decay(p),  p = (step - w) / (total_steps - w)

        constant:   lr throughout
        linear:     decay(p) = 1 - p                    (microgpt.py's, at w = 0 and min_lr = 0)
        cosine:     decay(p) = (1 + cos(pi p)) / 2      (Loshchilov & Hutter, 2017)
    """
    warmup = warmup_steps(schedule, total_steps)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if schedule.name == "constant":
        after: Any = lr
    else:
        linear = schedule.name == "linear"
        decay = 1 - progress if linear else (1 + np.cos(np.pi * progress)) / 2
        after = schedule.min_lr + (lr - schedule.min_lr) * decay
    rates = np.where(step < warmup, lr * (step + 1) / max(1, warmup), after)
    return rates[()]  # a number of a number
