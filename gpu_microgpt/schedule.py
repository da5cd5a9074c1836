"""Learning-rate schedules: a linear warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math

from .config import ScheduleConfig


def warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Steps w over which the rate rises to its peak."""
    return round(schedule.warmup_fraction * total_steps)


def learning_rate(schedule: ScheduleConfig, lr: float, step: int, total_steps: int) -> float:
    """Learning rate of step `step`, 0 <= step < total_steps, for the peak rate `lr`.

    With w steps of warm-up:

        step <  w:  lr * (step + 1) / w
        step >= w:  min_lr + (lr - min_lr) * decay(p),  p = (step - w) / (total_steps - w)

        constant:   lr throughout
        linear:     decay(p) = 1 - p                    (microgpt.py's, at w = 0 and min_lr = 0)
        cosine:     decay(p) = (1 + cos(pi p)) / 2      (Loshchilov & Hutter, 2017)
    """
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule.name == "constant":
        return lr
    progress = (step - warmup) / (total_steps - warmup)
    decay = 1 - progress if schedule.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return schedule.min_lr + (lr - schedule.min_lr) * decay
