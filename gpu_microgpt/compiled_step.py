"""Training with compiled kernels: the step recorded once, then played, many steps in one call.

What graph_step.py is for a GPU. The passes of model.py and the update are recorded as programs of
instructions; a call of `ops.cpu.step` gathers batches from the text and plays them. Where a step is
small, as many as are worth a call are done in one, and Python is not asked between them.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import numpy as np

from .activations import Activations
from .backend import Backend
from .config import Config
from .data.batch import Batch, Layout, Run
from .data.dataset import Split
from .host_step import HostEngine
from .model import GPT
from .ops.cpu import CompiledOps
from .ops.cpu.atomics import ABANDONED, WIDTH
from .ops.cpu.instructions import NAMES, Program
from .ops.cpu.play import play
from .ops.cpu.step import score_shard, train_steps
from .profile import PROFILED_STEPS
from .step import Shard, Shards

CALL_FLOPS = 1e9  # of one call at least: some 10 ms, much more than it costs; Ctrl-C waits for it
LOOKS = 5  # at an instruction's time


class RecordedShard:
    """A shard's passes as programs, and the memory its batches are gathered in."""

    def __init__(self, shard: Shard, share: tuple[int, int, int], size: int) -> None:
        """Record them, for batches of up to `size` sequences, of which it takes its share: which
        shard it is, of how many, in how many pieces."""
        rows, length = shard.memory.capacity, shard.model.dims.block_size
        tokens, targets, positions = (np.zeros(rows, "i4") for _ in range(3))
        offsets = np.zeros(size + 1, "i4")
        self._batch = Batch(tokens, targets, positions, Layout(offsets, (Run(0, 1, length),)), -1)
        sorting = tuple(np.zeros(n, np.int64) for n in (size, size + 1, length + 1))
        self.memory = share, (tokens, targets, positions, offsets), sorting  # as in ops.cpu.step
        self.shard, self.scale = shard, np.zeros(1)
        self.score = self._record(add=None)
        self.passes = tuple(self._record(add) for add in (False, True)) if shard.trains else ()

    def _record(self, add: bool | None) -> Program:
        """Forward and the losses, or with `add` forward and backward."""
        shard, model, memory, batch = self.shard, self.shard.model, self.shard.memory, self._batch
        ops = compiled_ops(memory)
        with ops.recording() as program:
            model.forward(memory, batch)
            if add is None:
                losses = model.loss(memory, batch)
            else:
                losses = model.backward(memory, batch, shard.grads, self.scale, add)
            ops.add_losses(shard.loss, losses)
        return program


class CompiledShards(Shards):
    """Shards whose passes are recorded."""

    recorded: list[RecordedShard]
    size: int  # sequences of a batch at most
    together: int  # of the largest batches in one call

    @classmethod
    def build(cls, model: GPT, config: Config, backend: Backend, training: bool = True) -> Self:
        """Take their memory and record."""
        shards = super().build(model, config, backend, training)
        count, size = len(shards.shards), config.train.batch_size
        length = model.dims.block_size
        shards.size = size
        shards.together = int(1 + CALL_FLOPS // model.dims.train_flops(size * length, length))
        shards.recorded = [
            RecordedShard(shard, (i, count, shards.pieces), size)
            for i, shard in enumerate(shards.shards)
        ]
        return shards

    def mean_loss(self, split: Split, limit: int = 0) -> float:
        """As Shards.mean_loss; a call a shard for some full batches, and one for what is left."""
        *full, last = split.items(limit)
        groups = [full[i : i + self.together] for i in range(0, len(full), self.together)]
        total, count = 0.0, 0
        for items in map(np.stack, [*groups, [last]]):
            starts, lengths = split.starts[items], split.lengths[items]
            self.check(lengths)
            self.backend.run([
                partial(
                    score_shard, r.score.like, r.score.code, split.flat, starts, lengths, *r.memory,
                    r.shard.loss,
                )
                for r in self.recorded
            ])  # fmt: skip
            total += sum(float(shard.loss[0]) for shard in self.shards)
            count += int(lengths.sum())
        return total / count

    def check(self, lengths: np.ndarray[Any, Any]) -> None:
        """Raise ValueError where batches of such sequences, (..., B), do not fit the memory taken:
        compiled code would write behind it."""
        size, longest = lengths.shape[-1], int(lengths.max())
        length = self.shards[0].model.dims.block_size
        if size > self.size or longest > length:
            raise ValueError(
                f"batch: got {size} sequences of up to {longest} rows, wanted at most "
                f"{self.size} of {length}"
            )


class CompiledEngine(HostEngine):
    """A model in training, whose steps are recorded."""

    shards = CompiledShards

    def __init__(
        self, model: GPT, config: Config, backend: Backend, split: Split, total_steps: int
    ) -> None:
        """Take memory and record; nothing is computed before the first step."""
        super().__init__(model, config, backend, split, total_steps)
        assert isinstance(self.step.shards, CompiledShards)
        self._shards = self.step.shards
        with compiled_ops(self.memory).recording() as self._measure:
            self.optimizer.measure(compiled_ops(self.memory), self.step.grads)
        shards = self._shards.shards
        self._applies = [
            self._apply(compiled_ops(shard.memory), part)
            for shard, part in zip(shards, self.optimizer.parts(len(shards)), strict=True)
        ]
        self._words = np.zeros((len(shards), WIDTH), np.int64)
        sums = [(shard.grads.flat.ctypes.data, shard.loss.ctypes.data) for shard in shards]
        self._sums = np.array(sums, np.int64)
        sequences = config.train.batch_size * config.train.grad_accum
        length = split.num_targets / len(split.lengths)
        flops = model.dims.train_flops(sequences * length, length)
        self._together = int(max(1, min(self.ring, CALL_FLOPS // flops)))
        self._eager = PROFILED_STEPS if config.profile else 0

    def _apply(self, ops: CompiledOps, part: slice) -> Program:
        """The update of a part of the weights."""
        with ops.recording() as program:
            self.optimizer.apply(ops, self.step.grads, part)
        return program

    @property
    def stride(self) -> int:
        """As many as make a call of CALL_FLOPS; one while steps are profiled."""
        return 1 if self._eager else self._together

    def train(self, step: int, count: int = 1) -> None:
        """Do them in one call."""
        if self._eager:
            self._eager = max(0, self._eager - count)
            super().train(step, count)
            return
        start = time.perf_counter()
        starts, lengths = self._split.sequences(step - 1, count)
        self._shards.check(lengths)
        optimizer = self.optimizer
        steps = np.arange(step, step + count)
        rates = optimizer.rates(self._rate(steps), steps)
        tasks = [
            partial(
                train_steps, *(p.code for p in r.passes), self._measure.code, apply.code,
                self._split.flat, starts, lengths, *r.memory, r.shard.grads.flat, r.scale,
                r.shard.loss, self._sums, self._words, optimizer.scalars, optimizer.norm, rates,
                self.step.records, step,
            )
            for r, apply in zip(self._shards.recorded, self._applies, strict=True)
        ]  # fmt: skip
        try:
            self.backend.run(tasks)
        except BaseException:  # this thread's, on its way: the others would wait for ever
            self._words[0, ABANDONED] = 1
            raise
        self._seconds += time.perf_counter() - start
        self._steps += count

    def instruction_times(self, seconds: float) -> dict[str, float]:
        """Seconds a step that the first shard's instructions take by name, each played again and
        again on the last batch and timed alone. The weights are worth nothing afterwards."""
        recorded, pieces = self._shards.recorded[0], self._shards.pieces
        batch = recorded.memory[1][-1]  # offsets of the last piece, then what was there before
        ends = np.flatnonzero(batch[1:] <= batch[:-1])
        sequences = int(ends[0]) if len(ends) else len(batch) - 1
        programs = [(recorded.passes[0], pieces), (self._measure, 1), (self._applies[0], 1)]
        share = seconds / sum(len(program.code) for program, _ in programs)
        times: dict[str, float] = defaultdict(float)
        for program, often in programs:
            for row in program.code:
                again = partial(_play_again, program, row, int(batch[sequences]), sequences)
                times[NAMES[row[0]]] += often * _seconds_each(again, share)
        return dict(times)


def _play_again(program: Program, row: Any, rows: int, sequences: int, count: int) -> None:
    play(program.like, np.repeat(row[None], count, axis=0), rows, sequences)


def _seconds_each(play_again: Callable[[int], None], seconds: float) -> float:
    """Of one of many in a row: the median of LOOKS that together take about so long."""
    count, times = 1, []
    while True:
        start = time.perf_counter()
        play_again(count)
        taken = time.perf_counter() - start
        if taken > seconds / LOOKS or count >= 1 << 20:
            times.append(taken / count)
            if len(times) == LOOKS:
                return statistics.median(times)
        else:
            count *= 2


def compiled_ops(memory: Activations) -> CompiledOps:
    """The operations of an arena, which can be recorded."""
    assert isinstance(memory.ops, CompiledOps)
    return memory.ops
