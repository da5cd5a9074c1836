"""Training as the trainer sees it, whatever the backend: steps are enqueued, figures asked for and
read when they have come."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from .activations import Activations
from .backend import Backend
from .backend.cuda import CudaBackend
from .backend.numpy import NumpyBackend
from .config import Config
from .data.dataset import Split
from .graph_step import GraphEvaluator, GraphStep
from .host_step import HostEngine
from .model import GPT
from .optim import Optimizer
from .profile import Profiler


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

    @property
    def stride(self) -> int:
        """Steps that are best given to `train` together, from now on."""

    def train(self, step: int, count: int = 1) -> None:
        """Enqueue so many steps from this one on, counted from 1; each follows the one before."""

    def ask(self) -> Figures:
        """Ask for the figures of the steps enqueued so far; does not wait for a device. Once they
        are read the steps are done: weights, moments and memory are the last one's."""

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
    engine = _host_engine(backend)(model, config, backend, split, total_steps)
    if profiler is not None:
        profiler.watch(shard.memory for shard in engine.step.shards.shards)
    return engine


def _host_engine(backend: Backend) -> type[HostEngine]:
    """Steps of operations one by one, or recorded where they are compiled (with Numba, which is
    not imported elsewhere)."""
    if not (isinstance(backend, NumpyBackend) and backend.compiled):
        return HostEngine
    from .compiled_step import CompiledEngine

    return CompiledEngine


def make_evaluator(model: GPT, config: Config, backend: Backend) -> Evaluator:
    """Take memory for scoring only."""
    if isinstance(backend, CudaBackend):
        return GraphEvaluator.build(model, config, backend)
    return _host_engine(backend).shards.build(model, config, backend, training=False)
