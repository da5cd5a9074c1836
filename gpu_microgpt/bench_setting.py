"""A row of the CPU's benchmark made ready the same for every engine, and how a step is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from .bench_rows import Row
from .config import Config
from .data.batch import Batch
from .data.corpus import load_corpus, quiet
from .data.dataset import Dataset
from .dims import Dims
from .params import seeded_weights
from .schedule import learning_rate

BATCHES = 64  # that peers are given beforehand and take in turn
WARM_UP, LEAST = 2, 3  # looks at the clock: not counted, and counted at least
COMPARED = 4  # first losses, to be the same for all engines


class Setting:
    """Config, sizes, data, initial weights."""

    def __init__(self, row: Row) -> None:
        """Read the corpus. Raises UserError for a row that cannot be."""
        self.row, self.config = row, Config.load(row.config, row.overrides())
        self.corpus = load_corpus(self.config.data, log=quiet)
        self.dataset = Dataset.build(self.config, self.corpus, log=quiet)
        self.dims = Dims.of(self.config.model, self.dataset.tokenizer.vocab_size)
        self.weights = seeded_weights(self.config, self.dims)
        self.steps = self.config.train.steps or 0  # rows count steps, not epochs

    @cached_property
    def batches(self) -> list[Batch]:
        """Of the first steps, of all where the row trains to an end."""
        count = self.steps if self.row.kind == "loss" else BATCHES
        return [self.dataset.train.batch(step) for step in range(count)]

    @cached_property
    def rates(self) -> np.ndarray[Any, Any]:
        """Learning rates of all steps."""
        steps, config = np.arange(self.steps), self.config
        found = learning_rate(config.schedule, config.optimizer.lr, steps, self.steps)
        return np.asarray(found)

    def rate(self, step: int) -> float:
        """Learning rate of a step counted from 1."""
        return float(self.rates[step - 1])

    def positions(self) -> float:
        """Mean real positions a step."""
        return statistics.fmean(len(batch.tokens) for batch in self.batches)

    def flops(self) -> float:
        """Mean floating-point operations a step on them."""
        size = self.config.train.batch_size
        return self.dims.train_flops(self.positions(), self.positions() / size)


class Trainee(Protocol):
    """A model in training, by whichever engine."""

    name: str  # one line: what computes
    positions: float  # mean positions a step works on, padding among them

    def steps(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """Do steps `first`, counted from 1, to first + count - 1; their losses (count,) float64 in
        nats a token, waited for."""


def time_training(trainee: Trainee, together: int, seconds: float) -> dict[str, Any]:
    """Time a step: `together` steps between two looks at the clock, whose last thing is to have the
    losses; `ms` is the median."""
    losses: list[float] = []

    def steps() -> None:
        losses.extend(trainee.steps(len(losses) + 1, together).tolist())

    steps()
    first_at = time.time()
    for _ in range(WARM_UP - 1):
        steps()
    times: list[float] = []
    busy = time.process_time()
    while len(times) < LEAST or sum(times) < seconds:
        start = time.perf_counter()
        steps()
        times.append(time.perf_counter() - start)
    busy = time.process_time() - busy
    return {
        "ms": 1e3 * statistics.median(times) / together,
        "steps": together * len(times),
        "losses": losses[:COMPARED],
        "positions": trainee.positions,
        "cores": busy / sum(times),
        "engine": trainee.name,
        "first_at": first_at,
    }


def train_to_end(trainee: Trainee, setting: Setting) -> list[float]:
    """All steps of a row that trains to an end; their losses."""
    losses: list[float] = []
    while len(losses) < setting.steps:
        count = min(setting.row.together, setting.steps - len(losses))
        losses.extend(trainee.steps(len(losses) + 1, count).tolist())
    return losses


def padded(batch: Batch, block_size: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens and targets (S, T) int64, padded to block_size or the batch's longest sequence; target
    -1 there."""
    lengths = np.diff(batch.layout.offsets)
    tokens = np.zeros((len(lengths), block_size or lengths.max()), np.int64)
    targets = np.full(tokens.shape, -1, np.int64)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    tokens[inside], targets[inside] = batch.tokens, batch.targets
    return tokens, targets


def fused(weights: Mapping[str, np.ndarray[Any, Any]], dims: Dims) -> dict[str, Any]:
    """float32 copies with q, k, v as one matrix, as a framework's user would have them: wte, wpe,
    lm_head, and of each layer I.wqkv, I.attn_wo, I.mlp_fc1, I.mlp_fc2; all (out, in)."""
    joined = {name: weights[name] for name in ("wte", "wpe", "lm_head")}
    for i in range(dims.n_layer):
        parts = [weights[f"layer{i}.attn_{w}"] for w in ("wq", "wk", "wv")]
        joined[f"{i}.wqkv"] = np.concatenate(parts)
        for name in ("attn_wo", "mlp_fc1", "mlp_fc2"):
            joined[f"{i}.{name}"] = weights[f"layer{i}.{name}"]
    return {name: array.astype(np.float32) for name, array in joined.items()}
