"""The benchmark's cases, made ready the same way for every engine that is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from .config import Config
from .data.batch import Batch
from .data.corpus import load_corpus
from .data.dataset import Dataset
from .dims import Dims
from .errors import UserError
from .params import initial_weights
from .rng import Stream, normal

WARM_UP, BATCHES = 3, 32

# a shipped config and what differs from it
CASES: dict[str, tuple[str, list[str]]] = {
    "names-d16": ("names", []),
    "names-d32": ("names", ["model.n_embd=32"]),
    "names-d64": ("names", ["model.n_embd=64"]),
    "names-d128": ("names", ["model.n_embd=128"]),
    "nanogpt-cpu": ("shakespeare", ["model.block_size=64", "train.batch_size=12"]),
    "shakespeare": ("shakespeare", []),
    "baby-gpt": ("baby_gpt", []),
}


class Setting:
    """A case made ready: config, sizes, batches and initial weights, the same for every engine."""

    def __init__(self, case: str, overrides: Sequence[str] = ()) -> None:
        """Read the corpus and make the batches. Raises UserError for an unknown case."""
        if case not in CASES:
            raise UserError(f"{case}: no such case; wanted one of {', '.join(CASES)}")
        name, differ = CASES[case]
        # a rate that no size diverges at: the subnormal numbers that follow slow products down
        same = ["backend=numpy", "optimizer.lr=1e-4", "schedule.min_lr=0"]
        self.config = Config.load(name, [*differ, *same, *overrides])
        quiet: Callable[[str], None] = lambda line: None  # noqa: E731
        self.corpus = load_corpus(self.config.data, log=quiet)
        dataset = Dataset.build(self.config, self.corpus, log=quiet)
        self.batches: list[Batch] = [dataset.train.batch(step) for step in range(BATCHES)]
        self.dims = Dims.of(self.config.model, dataset.tokenizer.vocab_size)
        draws = self.config.model.init_std * normal(
            self.config.seed, Stream.INIT, self.dims.num_params
        )
        self.weights = initial_weights(self.dims, draws, self.config.model.scale_residual_init)

    def rows(self) -> float:
        """Mean positions a step."""
        return statistics.fmean(len(batch.tokens) for batch in self.batches)

    def flops(self) -> float:
        """Mean floating-point operations a step."""
        return statistics.fmean(
            self.dims.train_flops(len(b.tokens), len(b.tokens) / (len(b.layout.offsets) - 1))
            for b in self.batches
        )


def timed(run: Callable[[int], None], seconds: float) -> list[float]:
    """Seconds of each call, after a warm-up, at least five and until the time is over."""
    for number in range(1, 1 + WARM_UP):
        run(number)
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        run(1 + WARM_UP + len(times))
        times.append(time.perf_counter() - start)
    return times
