"""One training step: the batch in shards, forward, backward, sum, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np

from .activations import Activations
from .backend import Backend
from .config import Config
from .data.batch import Batch
from .data.dataset import Split
from .dims import Dims
from .model import GPT
from .optim import Optimizer
from .params import Params

MAX_RECORDS = 1024  # steps whose loss waits to be read


class Shard:
    """A part of the batch: memory and gradients of its own, so that shards never wait."""

    def __init__(
        self, model: GPT, capacity: int, backend: Backend, grads: Params | None = None
    ) -> None:
        """Take memory for batches of up to `capacity` rows; without `grads` to evaluate only."""
        self.model = model
        self.memory = Activations(model.dims, capacity, backend, training=grads is not None)
        self._grads = grads
        self.loss = backend.zeros((1,), np.float64)  # sum over the rows seen

    @property
    def trains(self) -> bool:
        """Whether it has gradients."""
        return self._grads is not None

    @property
    def grads(self) -> Params:
        """Its share of the gradients. Raises ValueError where it was made to evaluate only."""
        if self._grads is None:
            raise ValueError("shard: made to evaluate only, it has no gradients")
        return self._grads

    def train(self, batches: Sequence[Batch], scale: float) -> None:
        """Sum losses, and gradients times `scale`, over the micro-batches."""
        self.loss.fill(0)
        if not batches:
            self.grads.flat.fill(0)
        for i, batch in enumerate(batches):
            self.model.forward(self.memory, batch)
            losses = self.model.backward(self.memory, batch, self.grads, scale, add=i > 0)
            self.memory.ops.add_losses(self.loss, losses)

    def evaluate(self, batches: Sequence[Batch]) -> None:
        """Sum losses only."""
        self.loss.fill(0)
        for batch in batches:
            self.model.forward(self.memory, batch)
            self.memory.ops.add_losses(self.loss, self.model.loss(self.memory, batch))


class Shards:
    """The shards side by side, each taking its part of a batch in so many pieces."""

    def __init__(self, shards: list[Shard], pieces: int, backend: Backend) -> None:
        """Join them."""
        self.shards, self.pieces, self.backend = shards, pieces, backend

    @classmethod
    def build(cls, model: GPT, config: Config, backend: Backend, training: bool = True) -> Self:
        """Plan them for the configured batch, and take their memory."""
        plan = ShardPlan.of(config, model.dims, backend)

        def grads() -> Params | None:
            return Params(model.dims, backend) if training else None

        shards = [Shard(model, plan.rows, backend, grads()) for _ in range(plan.shards)]
        return cls(shards, plan.pieces, backend)

    def run(self, what: str, batches: Sequence[Batch], *args: float) -> None:
        """Let each shard work on its part of every micro-batch."""
        count = len(self.shards)
        parts = [batch.split(count * self.pieces) for batch in batches]
        self.backend.run([
            partial(getattr(shard, what), [p for part in parts for p in part[i::count]], *args)
            for i, shard in enumerate(self.shards)
        ])  # fmt: skip

    def evaluate(self, batch: Batch) -> float:
        """Sum of the batch's losses in nats; waits for the device."""
        self.run("evaluate", [batch])
        return sum(float(self.backend.to_host(shard.loss)[0]) for shard in self.shards)

    def mean_loss(self, split: Split, limit: int = 0) -> float:
        """Mean loss in nats a token over a split, or over `limit` of its batches."""
        total, count = 0.0, 0
        for batch in split.batches(limit):
            total += self.evaluate(batch)
            count += batch.num_targets
        return total / count


class Step:
    """The whole step over all shards. It takes no large memory and reads nothing back.

    `records` (ring, 3) float64 keeps loss, gradient norm and number of targets of the last `ring`
    steps, step s in row s % ring, to be read when they are wanted.
    """

    def __init__(
        self, model: GPT, optimizer: Optimizer, shards: Shards, backend: Backend, ring: int
    ) -> None:
        """Join the parts."""
        self.model, self.optimizer, self.backend = model, optimizer, backend
        self.shards = shards
        self.records = backend.zeros((ring, 3), np.float64)

    @classmethod
    def build(
        cls, model: GPT, config: Config, backend: Backend, kind: type[Shards] = Shards
    ) -> Step:
        """Plan the shards for the configured batch, and take their memory."""
        shards = kind.build(model, config, backend)
        optimizer = Optimizer(config.optimizer, model.params, backend)
        return cls(model, optimizer, shards, backend, records_kept(config))

    @property
    def grads(self) -> Params:
        """The whole batch's gradients after a step, before clipping."""
        return self.shards.shards[0].grads

    def train(self, batches: Sequence[Batch], rate: float, step: int) -> None:
        """Update the weights on the micro-batches together; `step` counts from 1.

        The loss is the mean over all their targets, so accumulating equals one large batch.
        """
        count = sum(batch.num_targets for batch in batches)
        self.shards.run("train", batches, 1 / count)
        self.update(count, rate, step)

    def update(self, count: int, rate: float, step: int) -> None:
        """The rest, once the shards have losses and gradients of a step with `count` targets."""
        first, *others = self.shards.shards
        for shard in others:
            first.grads.flat += shard.grads.flat
            first.loss += shard.loss
        workers = [shard.memory.ops for shard in self.shards.shards]
        self.optimizer.update(workers, first.grads, rate, step)
        record = self.records[step % len(self.records)]
        record[:1] = first.loss
        record[:1] /= count
        record[1:2] = self.optimizer.norm
        record[2:] = count


@dataclass(frozen=True)
class ShardPlan:
    """How a micro-batch is cut: into shards side by side, each in pieces of at most `rows`."""

    shards: int
    pieces: int
    rows: int

    @classmethod
    def of(cls, config: Config, dims: Dims, backend: Backend) -> ShardPlan:
        """Ask the backend what suits the configured batch."""
        size, length = config.train.batch_size, dims.block_size
        shards, pieces = backend.split(size, length, dims.train_flops(size * length, length))
        sequences = -(-size // (shards * pieces))
        # cuts fall between sequences, so where lengths differ (documents, the short window at the
        # end of a held-out text) a piece may exceed its share by one of them
        return cls(shards, pieces, min(size, sequences + 1) * length)


def records_kept(config: Config) -> int:
    """Steps whose figures wait to be read: a log interval, if that is not too many."""
    return min(config.train.log_interval, MAX_RECORDS)
