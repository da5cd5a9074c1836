"""Training with compiled kernels: the step recorded once, then played, many steps in one call.

What graph_step.py is for a GPU. The forward and backward pass of model.py and the update are
recorded as programs of instructions; a call of `ops.cpu.step` draws batches from the text and plays
them. Where a step is small Python is not asked between steps: they wait here until there is work
enough for a call, or their figures are asked for.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np

from .activations import Activations
from .backend import Backend
from .config import Config
from .data.batch import Batch, Layout, Run
from .data.dataset import Split
from .host_step import HostEngine, HostFigures
from .model import GPT
from .ops.cpu import CompiledOps
from .ops.cpu.step import train_shard, train_steps
from .profile import PROFILED_STEPS
from .step import Shard

CALL_FLOPS = 1e9  # of the steps of one call at least: some 10 ms, much more than a call costs


class Recorded:
    """A shard's passes as programs, and the memory its batches are gathered in."""

    def __init__(self, shard: Shard, config: Config, backend: Backend) -> None:
        """Record them."""
        memory, size, length = shard.memory, config.train.batch_size, shard.model.dims.block_size
        tokens, targets, positions = (backend.zeros((memory.capacity,), "i4") for _ in range(3))
        offsets = backend.zeros((size + 1,), "i4")
        self.ids = tokens, targets, positions, offsets
        self.sorting = tuple(np.zeros(n, np.int64) for n in (size, size + 1, length + 1))
        self.scale = np.zeros(1)
        batch = Batch(tokens, targets, positions, Layout(offsets, (Run(0, 1, length),)), -1)
        ops = compiled_ops(memory)
        self.programs = []
        for add in (False, True):
            with ops.recording() as program:
                shard.model.forward(memory, batch)
                losses = shard.model.backward(memory, batch, shard.grads, self.scale, add)
                ops.add_losses(shard.loss, losses)
            self.programs.append(program)
        self.passes = tuple(program.code for program in self.programs)


class CompiledEngine(HostEngine):
    """A model in training, whose steps wait until there are enough, or figures are wanted."""

    def __init__(
        self, model: GPT, config: Config, backend: Backend, split: Split, total_steps: int
    ) -> None:
        """Take memory and record; nothing is computed before the first step."""
        super().__init__(model, config, backend, split, total_steps)
        shards = self.step.shards.shards
        self._recorded = [Recorded(shard, config, backend) for shard in shards]
        self._flat = np.ascontiguousarray(split.flat)
        ops = compiled_ops(self.memory)
        with ops.recording() as self._update:
            self.optimizer.measure(ops, self.step.grads)
            self.optimizer.apply(ops, self.step.grads)
        self._update_code = self._update.code
        sequences = config.train.batch_size * config.train.grad_accum
        length = split.num_targets / len(split.lengths)
        flops = model.dims.train_flops(sequences * length, length)
        self._together = int(max(1, min(self.ring, CALL_FLOPS // flops)))
        self._eager = PROFILED_STEPS if config.profile else 0
        self._waiting: list[int] = []

    def train(self, step: int) -> None:
        """Do it with those that wait, or leave it to wait. Raises ValueError where a step is left
        out."""
        if self._eager:
            self._eager -= 1
            super().train(step)
            return
        if self._waiting and step != self._waiting[-1] + 1:
            raise ValueError(f"train: got step {step}, wanted {self._waiting[-1] + 1}")
        self._waiting.append(step)
        if len(self._waiting) == self._together:
            self._work()

    def ask(self) -> HostFigures:
        """Those of all steps, which are done by then."""
        self._work()
        return super().ask()

    def gradients(self) -> dict[str, np.ndarray[Any, Any]]:
        """As a HostEngine's."""
        self._work()
        return super().gradients()

    def mean_loss(self, split: Split, limit: int = 0) -> float:
        """Of the weights after all steps."""
        self._work()
        return super().mean_loss(split, limit)

    def _work(self) -> None:
        """Do the steps that wait."""
        if not self._waiting:
            return
        start = time.perf_counter()
        first, count = self._waiting[0], len(self._waiting)
        self._waiting.clear()
        starts, lengths = self._split.sequences(first - 1, count)
        if len(self._recorded) == 1:
            self._steps_of_one_shard(starts, lengths, first)
        else:
            for k in range(count):
                self._step_of_shards(starts[k], lengths[k], first + k)
        self._seconds += time.perf_counter() - start
        self._steps += count

    def _steps_of_one_shard(self, starts: Any, lengths: Any, first: int) -> None:
        """All of them in one call."""
        optimizer, (recorded,), records = self.optimizer, self._recorded, self.step.records
        (shard,), pieces = self.step.shards.shards, self.step.shards.pieces
        steps = range(first, first + len(starts))
        rates = np.array([optimizer.rates(self._rate(step), step) for step in steps])
        train_steps(
            *recorded.passes, self._update_code, self._flat, starts, lengths, (0, 1, pieces),
            recorded.ids, recorded.sorting, shard.grads.flat, recorded.scale, shard.loss,
            optimizer.norm, optimizer.scalars, rates, records, first,
        )  # fmt: skip

    def _step_of_shards(self, starts: Any, lengths: Any, step: int) -> None:
        """Side by side, then the update."""
        shards = self.step.shards

        def work(number: int, shard: Shard, recorded: Recorded) -> None:
            train_shard(
                *recorded.passes, self._flat, starts, lengths,
                (number, len(shards.shards), shards.pieces), recorded.ids, recorded.sorting,
                shard.grads.flat, recorded.scale, shard.loss,
            )  # fmt: skip

        pairs = zip(shards.shards, self._recorded, strict=True)
        self.backend.run([partial(work, i, *pair) for i, pair in enumerate(pairs)])
        self.step.update(int(lengths.sum()), self._rate(step), step)


def compiled_ops(memory: Activations) -> CompiledOps:
    """The operations of an arena, which can be recorded."""
    assert isinstance(memory.ops, CompiledOps)
    return memory.ops
