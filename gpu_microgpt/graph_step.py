"""The training step on a GPU: captured once, replayed ever after, nothing asked of the host.

A step is one graph: the batch drawn from the text by a counter, forward, backward, the schedule,
clipping, AdamW. With gradient accumulation there are three: the first micro-batch, which overwrites
the gradients, the others, which add to them, and the update. All that changes from step to step
lives on the device. Gradients and losses are sums over targets there; the update divides them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .activations import Activations
from .backend.cuda import CudaBackend
from .backend.gpu import Download, Event, Graph
from .config import Config
from .data.batch import Batch, Layout, Run
from .data.dataset import Split
from .model import GPT
from .ops.cuda import CudaOps
from .ops.cuda.batch import DeviceSplit
from .ops.cuda.step import UpdatePlan
from .optim import Optimizer
from .params import Params
from .profile import PROFILED_STEPS
from .step import records_kept
from .types import Array


class DeviceBatch:
    """The arrays every graph finds its batch in: room for B sequences of T rows."""

    def __init__(self, batch_size: int, block_size: int, backend: CudaBackend) -> None:
        """Take the memory; B sequences without rows."""
        rows = batch_size * block_size
        tokens, targets, positions = (backend.zeros((rows,), "i4") for _ in range(3))
        self.offsets = backend.zeros((batch_size + 1,), "i4")
        self.count = backend.zeros((1,), "i4")  # targets
        layout = Layout(self.offsets, (Run(0, batch_size, block_size),))
        self.batch = Batch(tokens, targets, positions, layout, num_targets=-1)

    @property
    def rows(self) -> tuple[Array, Array, Array]:
        """tokens, targets, positions."""
        return self.batch.tokens, self.batch.targets, self.batch.positions


@dataclass(frozen=True)
class GraphFigures:
    """Records on their way from the device, between two events of its clock."""

    values: Download
    since: Event | None
    until: Event
    steps: int

    def done(self) -> bool:
        """Whether they have arrived."""
        return self.values.done()

    def records(self) -> np.ndarray[Any, Any]:
        """(ring, 3) float64, waited for."""
        return self.values.wait()

    def ms_per_step(self) -> float:
        """By the device's events."""
        return self.until.ms_since(self.since) / self.steps if self.since and self.steps else 0.0


class GraphStep:
    """A model in training on a split that lies on the device (`engine.Engine`)."""

    def __init__(
        self, model: GPT, config: Config, backend: CudaBackend, split: Split, total_steps: int
    ) -> None:
        """Take memory; nothing is computed before the first step."""
        train, block_size = config.train, model.dims.block_size
        self.model, self.gpu, self.backend = model, backend.gpu, backend
        self.memory = Activations(model.dims, train.batch_size * block_size, backend)
        self.optimizer = Optimizer(config.optimizer, model.params, backend)
        self.grads = Params(model.dims, backend)
        self.ring, self._micros = records_kept(config), train.grad_accum
        self._plan = UpdatePlan.of(config, total_steps)
        self._text = DeviceSplit.of(split, backend.from_host)
        self._batch = DeviceBatch(train.batch_size, block_size, backend)
        self._counter = backend.zeros((1,), "i8")  # micro-batches done
        self._targets = backend.zeros((1,), "i8")  # of the step's micro-batches so far,
        self._loss = backend.zeros((1,), "f8")  # and the sum of their losses
        self._records = backend.zeros((self.ring, 3), "f8")
        self._evaluator = GraphEvaluator(model, self.memory, self._batch, backend)
        self._eager = PROFILED_STEPS if config.profile else 1  # steps before all are captured
        self._graphs: list[Graph] = []  # of one step, in order
        self._last: int | None = None
        self._since: Event | None = None
        self._timed = 0

    @property
    def stride(self) -> int:
        """The host is ahead of the device as it is."""
        return 1

    def train(self, step: int, count: int = 1) -> None:
        """Enqueue them; the first, or the first few to be profiled, are done eagerly and then
        captured.

        Raises ValueError where a step is left out.
        """
        for number in range(step, step + count):
            self._enqueue(number)

    def _enqueue(self, step: int) -> None:
        if self._last is None:
            done = (step - 1) * self._micros
            self.gpu.upload(self._counter, np.array([done], np.int64))
        elif step != self._last + 1:
            raise ValueError(f"train: got step {step}, wanted {self._last + 1}")
        if self._eager:
            self._eager -= 1
            self._do_eagerly(capture=not self._eager)
        else:
            if self._since is None:
                self._since, self._timed = self.gpu.event(), 0
            for graph in self._graphs:
                graph.launch()
            self._timed += 1
        self._last = step

    def ask(self) -> GraphFigures:
        """Enqueue a copy of the records."""
        until = self.gpu.event()
        figures = GraphFigures(self.gpu.download(self._records), self._since, until, self._timed)
        if self._since is not None:
            self._since, self._timed = until, 0
        return figures

    def pause(self) -> None:
        """The next step starts the clock anew."""
        self._since, self._timed = None, 0

    def mean_loss(self, split: Split, limit: int = 0) -> float:
        """In the memory of training."""
        return self._evaluator.mean_loss(split, limit)

    def gradients(self) -> dict[str, np.ndarray[Any, Any]]:
        """Of the mean loss. Raises ValueError before the first step."""
        if self._last is None:
            raise ValueError("gradients: wanted after a step")
        count = self.backend.to_host(self._records)[self._last % self.ring, 2]
        sums = self.grads.to_host(self.backend)
        return {name: (array / count).astype(array.dtype) for name, array in sums.items()}

    def _do_eagerly(self, capture: bool) -> None:
        """A step; with every graph captured behind the last of these.

        In the first, kernels are loaded and plans of matrix products measured, neither of which can
        be captured. Measuring repeats a product into its own output, and so changes no result.
        """
        others = self._micros - 1
        parts: list[Callable[[], None]] = [self._whole]
        if others:
            parts = [self._first_micro_batch, *[self._other_micro_batch] * others, self._update]
        for part in parts:
            part()
        if capture:
            graphs = {part: self.gpu.capture(part) for part in dict.fromkeys(parts)}
            self._graphs = [graphs[part] for part in parts]

    def _whole(self) -> None:
        """A step of one micro-batch."""
        self._first_micro_batch()
        self._update()

    def _first_micro_batch(self) -> None:
        self._micro_batch(add=False)

    def _other_micro_batch(self) -> None:
        self._micro_batch(add=True)

    def _micro_batch(self, add: bool) -> None:
        """Draw a batch, add up its losses, and put or add its gradients."""
        ops, batch, loss = cuda_ops(self.memory), self._batch, self._loss
        self._text.batch(ops, *batch.rows, batch.offsets, batch.count, self._counter)
        self.model.forward(self.memory, batch.batch)
        losses = self.model.backward(self.memory, batch.batch, self.grads, 1.0, add)
        ops.add_losses(loss, losses)
        ops.advance(self._counter, self._targets, batch.count)

    def _update(self) -> None:
        """Schedule, norm, clipping, record, AdamW."""
        ops, optimizer = cuda_ops(self.memory), self.optimizer
        ops.global_norm(optimizer.norm, self.grads.flat)
        ops.update_scalars(
            optimizer.scalars, self._records, self._loss, self._targets, optimizer.norm,
            self._counter, self._plan,
        )  # fmt: skip
        optimizer.apply(ops, self.grads)


class GraphEvaluator:
    """Scores a model: a graph a batch, whose sequences are looked up in the text on the device."""

    def __init__(
        self, model: GPT, memory: Activations, batch: DeviceBatch, backend: CudaBackend
    ) -> None:
        """Work in this memory, between other uses of it."""
        self.model, self.memory, self.backend, self.gpu = model, memory, backend, backend.gpu
        self._batch = batch
        self._sources = backend.zeros((len(batch.offsets) - 1,), "i8")
        self._total = backend.zeros((1,), "f8")
        self._known: tuple[Split, int] | None = None  # what the following is of

    @classmethod
    def build(cls, model: GPT, config: Config, backend: CudaBackend) -> GraphEvaluator:
        """Take memory for scoring only."""
        size, block_size = config.train.batch_size, model.dims.block_size
        memory = Activations(model.dims, size * block_size, backend, training=False)
        return cls(model, memory, DeviceBatch(size, block_size, backend), backend)

    def mean_loss(self, split: Split, limit: int = 0) -> float:
        """Mean loss in nats a token over a split, or over `limit` of its batches; waits once."""
        if self._known != (split, limit):
            self._prepare(split, limit)
        self.gpu.zero(self._total)
        for sources, offsets in zip(self._table[0], self._table[1], strict=True):
            self.gpu.copy(self._sources, sources)
            self.gpu.copy(self._batch.offsets, offsets)
            self._graph.launch()
        return float(self.backend.to_host(self._total)[0]) / self._count

    def _prepare(self, split: Split, limit: int) -> None:
        """Copy the text and where each batch's sequences lie; capture."""
        self._text = DeviceSplit.of(split, self.backend.from_host)
        tables = [_lookup(split, items, len(self._sources)) for items in split.items(limit)]
        sources, offsets = (np.stack(table) for table in zip(*tables, strict=True))
        self._table = (self.backend.from_host(sources), self.backend.from_host(offsets))
        self._count = int(offsets[:, -1].sum())
        self.gpu.copy(self._sources, self._table[0][0])
        self.gpu.copy(self._batch.offsets, self._table[1][0])
        self._score()
        self._graph = self.gpu.capture(self._score)
        self._known = (split, limit)

    def _score(self) -> None:
        """Add the losses of the batch at the sources."""
        ops, batch = cuda_ops(self.memory), self._batch
        self._text.gather(ops, *batch.rows, self._sources, batch.offsets)
        self.model.forward(self.memory, batch.batch)
        ops.add_losses(self._total, self.model.loss(self.memory, batch.batch))


def _lookup(
    split: Split, items: np.ndarray[Any, Any], size: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sources (size,) int64 and offsets (size + 1,) int32 of a batch, shortest sequence first, as
    `gather` has it; behind them sequences without rows."""
    order = split.lengths[items].argsort(kind="stable")
    sources, offsets = np.zeros(size, np.int64), np.zeros(size + 1, np.int32)
    sources[: len(items)] = split.starts[items][order]
    offsets[1 : len(items) + 1] = split.lengths[items][order].cumsum()
    offsets[len(items) + 1 :] = offsets[len(items)]
    return sources, offsets


def cuda_ops(memory: Activations) -> CudaOps:
    """The operations of an arena on a GPU: the protocol's, and what only graphs need."""
    assert isinstance(memory.ops, CudaOps)
    return memory.ops
