"""The doctor's trials: short trainings that every machine does alike, timed, their losses known.

They need no network and no file: the text is made up, weights and batches follow from the seed.
The losses of float64 stand here; a test computes them anew.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .backend import Backend, choose
from .backend.numpy import NumpyBackend
from .config import Config
from .data.corpus import Corpus, quiet
from .data.dataset import Dataset
from .dims import Dims
from .engine import Engine, make_engine
from .model import GPT
from .params import Weights, seeded_weights
from .rng import Stream, uniform

WORDS, SYLLABLES = 4_000, 5
PATIENCE = 6.0  # seconds after the first log interval, from when on a trial ends early


@dataclass(frozen=True)
class Trial:
    """A training and what is known of it."""

    name: str
    config: str  # a shipped one
    overrides: tuple[str, ...]  # what differs from it; a log interval is a turn of the clock
    losses: Mapping[int, float]  # step -> nats a token, in float64 with the reference operations
    shares: Mapping[str, float]  # kernels -> share of the sgemm rate that a step is known to reach
    all_cores: bool  # whether that is the rate of all threads together, or of one


@dataclass(frozen=True)
class Outcome:
    """What a trial came to here."""

    trial: str
    engine: str  # what computed: the backend's own words
    kernels: str  # compiled, reference or cuda
    dtype: str  # of activations
    steps: int  # done
    milliseconds: float  # a step, median over the log intervals after the first
    warm_up: float  # seconds for the first log interval: loads or compiles the kernels
    flops: float  # a step
    peak_flops: float | None  # a second, that the device promises, where that is known
    losses: dict[int, float]  # step -> nats a token, of those that are known


# Shares: what a step reached on 2 cores of an Intel Xeon with AVX-512 (docs/benchmarks/cpu.md has
# others), batches and the way from Python to the kernels included.
NAMES = Trial(
    name="names",
    config="names",
    overrides=("optimizer.lr=3e-3", "train.steps=400", "train.log_interval=50"),
    losses={
        1: 3.068256711,
        5: 2.863625082,
        10: 2.677761410,
        20: 2.309079953,
        50: 1.966308463,
        100: 1.959082627,
    },
    shares={"compiled": 0.3, "reference": 0.025},
    all_cores=False,
)
SHAKESPEARE = Trial(
    name="Shakespeare",
    config="shakespeare",
    overrides=("train.steps=9", "train.log_interval=3"),
    losses={1: 3.097807880, 3: 2.591045235, 6: 2.049561694, 9: 1.996977541},
    shares={"compiled": 0.8, "reference": 0.45},
    all_cores=True,
)


def made_up_text() -> str:
    """Words of one to five syllables, common ones and rare ones, one a line."""
    syllables = [first + second for first in "bdfghklmnprstvz" for second in "aeiou"]
    draws = uniform(0, Stream.SAMPLE, np.arange(WORDS * (1 + SYLLABLES)))
    return "".join(
        "".join(syllables[int(len(syllables) * u * u)] for u in us[: 1 + int(SYLLABLES * length)])
        + "\n"
        for length, *us in draws.reshape(WORDS, -1).tolist()
    )


def run_trial(trial: Trial, overrides: Sequence[str] = ()) -> Outcome:
    """Train as the trial says, on the backend, dtype and threads that `overrides` ask for.

    Raises UserError where that cannot be had.
    """
    config = Config.load(trial.config, ["data.val_fraction=0", *trial.overrides, *overrides])
    backend = choose(config)
    engine, dims = _engine(config, backend)
    end = config.train.steps or 0
    losses: dict[int, float] = {}
    seconds: list[float] = []
    targets = 0.0
    with backend:
        for first in range(1, end + 1, engine.ring):
            steps = range(first, min(first + engine.ring, end + 1))
            start = time.perf_counter()
            engine.train(first, len(steps))
            records = engine.ask().records()
            seconds.append((time.perf_counter() - start) / len(steps))
            for step in steps:
                loss, _, count = records[step % engine.ring].tolist()
                losses[step] = loss
                targets += count
            if sum(seconds[1:]) * engine.ring >= PATIENCE:
                break
    done = len(losses)
    length = targets / done / config.train.batch_size
    return Outcome(
        trial=trial.name,
        engine=backend.describe(),
        kernels=_kernels(backend),
        dtype=backend.dtype.name,
        steps=done,
        milliseconds=1e3 * statistics.median(seconds[1:] or seconds),
        warm_up=seconds[0] * engine.ring,
        flops=dims.train_flops(targets / done, length),
        peak_flops=backend.peak_flops(),
        losses={step: loss for step, loss in losses.items() if step in trial.losses},
    )


def _kernels(backend: Backend) -> str:
    """Whose operations compute."""
    if not isinstance(backend, NumpyBackend):
        return "cuda"
    return "compiled" if backend.compiled else "reference"


def _engine(config: Config, backend: Backend) -> tuple[Engine, Dims]:
    """The trial's model, about to begin."""
    text = made_up_text()
    digest = hashlib.sha256(text.encode()).hexdigest()
    corpus = Corpus(text, "made-up", Path("made-up"), digest, "made-up")
    dataset = Dataset.build(config, corpus, log=quiet)
    dims = Dims.of(config.model, dataset.tokenizer.vocab_size)
    model = GPT(Weights(dims, backend))
    model.params.load(seeded_weights(config, dims), backend)
    return make_engine(model, config, backend, dataset.train, config.train.steps or 0), dims
