"""Training as the trainer sees it, whatever the backend: steps are enqueued, figures asked for and
read when they have come."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .activations import Activations
from .backend import Backend
from .backend.cuda import CudaBackend
from .config import Config
from .data.dataset import Split
from .graph_step import GraphEvaluator, GraphStep
from .model import GPT
from .optim import Optimizer
from .profile import Profiler
from .schedule import learning_rate
from .step import Shards, Step


class Figures(Protocol):
    """What the steps so far came to, on its way to the host."""

    def done(self) -> bool:
        """Whether it has arrived; does not wait."""

    def records(self) -> np.ndarray[Any, Any]:
        """(ring, 3) float64, waited for: loss in nats a token, gradient norm before clipping and
        number of targets of step s in row s % ring."""

    def ms_per_step(self) -> float:
        """Mean time of the steps since the figures before, or since a pause; 0: none was timed."""


class Engine(Protocol):
    """A model in training on a split."""

    optimizer: Optimizer
    memory: Activations  # to look into after a forward pass
    ring: int  # steps after which figures must have been asked for

    def train(self, step: int) -> None:
        """Enqueue a step, counted from 1; each follows the one before."""

    def ask(self) -> Figures:
        """Ask for the figures of the steps enqueued so far; does not wait."""

    def pause(self) -> None:
        """What comes until the next step is not to be counted in its time."""

    def mean_loss(self, split: Split, limit: int = 0) -> float:
        """Mean loss in nats a token over a split, or over `limit` of its batches; waits."""

    def gradients(self) -> dict[str, np.ndarray[Any, Any]]:
        """Host copies of the last step's gradients, before clipping, by name; waits."""


class Evaluator(Protocol):
    """A model to be scored."""

    def mean_loss(self, split: Split, limit: int = 0) -> float:
        """As an engine's."""


def make_engine(
    model: GPT,
    config: Config,
    backend: Backend,
    split: Split,
    total_steps: int,
    profiler: Profiler | None = None,
) -> Engine:
    """Take memory for training `model` on `split`; on the CPU, `profiler` sees its operations."""
    if isinstance(backend, CudaBackend):
        return GraphStep(model, config, backend, split, total_steps)
    engine = HostEngine(model, config, backend, split, total_steps)
    if profiler is not None:
        profiler.watch(shard.memory for shard in engine.step.shards.shards)
    return engine


def make_evaluator(model: GPT, config: Config, backend: Backend) -> Evaluator:
    """Take memory for scoring only."""
    if isinstance(backend, CudaBackend):
        return GraphEvaluator.build(model, config, backend)
    return Shards.build(model, config, backend, training=False)


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

    def __init__(
        self, model: GPT, config: Config, backend: Backend, split: Split, total_steps: int
    ) -> None:
        """Take memory."""
        self.config, self.backend, self._split, self._total = config, backend, split, total_steps
        self.step = Step.build(model, config, backend)
        self.optimizer = self.step.optimizer
        self.memory = self.step.shards.shards[0].memory
        self.ring = len(self.step.records)
        self._seconds, self._steps = 0.0, 0

    def train(self, step: int) -> None:
        """Do a step."""
        start = time.perf_counter()
        config = self.config
        rate = learning_rate(config.schedule, config.optimizer.lr, step - 1, self._total)
        micros = range(config.train.grad_accum)
        self.step.train([self._split.batch(step - 1, micro) for micro in micros], rate, step)
        self._seconds += time.perf_counter() - start
        self._steps += 1

    def ask(self) -> Figures:
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
