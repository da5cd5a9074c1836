"""Training steps on the CPU, operation by operation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import Backend
from .config import Config
from .data.dataset import Split
from .model import GPT
from .schedule import Steps, learning_rate
from .step import Shards, Step


@dataclass(frozen=True)
class HostFigures:
    """Nothing is on its way: the host did the work."""

    values: np.ndarray[Any, Any]
    seconds: float
    steps: int

    def done(self) -> bool:
        """It has."""
        return True

    def records(self) -> np.ndarray[Any, Any]:
        """A copy of the step's."""
        return self.values

    def ms_per_step(self) -> float:
        """By the host's clock, making batches included."""
        return 1e3 * self.seconds / self.steps if self.steps else 0.0


class HostEngine:
    """Batches made and worked on by the host, one step after the other."""

    shards: type[Shards] = Shards

    def __init__(
        self, model: GPT, config: Config, backend: Backend, split: Split, total_steps: int
    ) -> None:
        """Take memory."""
        self.config, self.backend, self._split, self._total = config, backend, split, total_steps
        self.step = Step.build(model, config, backend, self.shards)
        self.optimizer = self.step.optimizer
        self.memory = self.step.shards.shards[0].memory
        self.ring = len(self.step.records)
        self._seconds, self._steps = 0.0, 0

    @property
    def stride(self) -> int:
        """Nothing is gained by more than one."""
        return 1

    def train(self, step: int, count: int = 1) -> None:
        """Do them."""
        start = time.perf_counter()
        micros = range(self.config.train.grad_accum)
        for number in range(step, step + count):
            batches = [self._split.batch(number - 1, micro) for micro in micros]
            self.step.train(batches, float(self._rate(number)), number)
        self._seconds += time.perf_counter() - start
        self._steps += count

    def ask(self) -> HostFigures:
        """They are here."""
        records = self.backend.to_host(self.step.records)
        figures = HostFigures(records, self._seconds, self._steps)
        self._seconds, self._steps = 0.0, 0
        return figures

    def pause(self) -> None:
        """Only steps are timed."""

    def mean_loss(self, split: Split, limit: int = 0) -> float:
        """Over the shards."""
        return self.step.shards.mean_loss(split, limit)

    def gradients(self) -> dict[str, np.ndarray[Any, Any]]:
        """Of the mean loss, summed over the shards."""
        return self.step.grads.to_host(self.backend)

    def instruction_times(self, seconds: float) -> dict[str, float]:
        """Seconds a step by instruction, measured over so many: none is recorded here."""
        return {}

    def _rate(self, step: Steps) -> Any:
        """Learning rate of a step counted from 1, or of many."""
        config = self.config
        return learning_rate(config.schedule, config.optimizer.lr, step - 1, self._total)
