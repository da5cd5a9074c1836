"""The models that are measured on a GPU, made ready the same way for every engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import memory_plan
from .backend import Backend
from .bench_rows import STEADY
from .config import Config
from .data.corpus import FOLDER_VARIABLE, cache_folder, load_corpus, quiet
from .data.dataset import Dataset, Split
from .dims import Dims
from .errors import BackendError
from .params import initial_weights

TEXT = 1_000_000  # tokens of a made-up text
SAME = (*STEADY, "train.log_interval=100")  # for all engines: room for many records
NAMES = (3, 9)  # letters of a made-up name, at least and below


@dataclass(frozen=True)
class GpuCase:
    """A shipped config, what differs from it, and how many tokens its corpus has."""

    title: str
    config: str
    vocab_size: int
    differs: tuple[str, ...] = ()


GPU_CASES = {
    "names": GpuCase("names: C 16, L 1, H 4, T 16", "names", 27),
    "shakespeare": GpuCase("Shakespeare: C 128, L 4, H 4, T 256", "shakespeare", 66),
    "baby-gpt": GpuCase("baby GPT: C 384, L 6, H 6, T 256", "baby_gpt", 66),
    "124m": GpuCase(
        "124M class: C 768, L 12, H 12, T 1024, V 50,257", "baby_gpt", 50257,
        ("model.n_layer=12", "model.n_head=12", "model.n_embd=768", "model.block_size=1024"),
    ),
}  # fmt: skip


class GpuSetting:
    """A case made ready: config, sizes, training split and initial weights.

    The text is the config's, where it lies on this machine: nothing is downloaded. Else, and for
    a vocabulary that no corpus here has, tokens are made up: a step takes as long for them.
    """

    def __init__(
        self, case: str, backend: Backend, overrides: Sequence[str] = (), vocab_size: int = 0
    ) -> None:
        """Halve the batch until it fits the backend's memory.

        `overrides` of the case's settings; `vocab_size`: another one, of a made-up text. Raises
        BackendError where not even a single sequence fits.
        """
        chosen = GPU_CASES[case]
        wanted = vocab_size or chosen.vocab_size
        config = Config.load(chosen.config, [*chosen.differs, *SAME, *overrides])
        self.title, self.config = chosen.title, _fitting(config, wanted, backend)
        self.rng = np.random.default_rng(self.config.seed)
        split = None if vocab_size else self._corpus(wanted)
        self.text = "made up" if split is None else self.config.data.source
        self.split = split or made_up(self.config, wanted, self.rng)
        self.dims = Dims.of(self.config.model, wanted)
        self.weights = self._weights()

    def tokens(self) -> float:
        """Mean positions a step."""
        train = self.config.train
        return float(self._lengths().mean() * train.batch_size * train.grad_accum)

    def flops(self) -> float:
        """Mean floating-point operations a step."""
        return self.dims.train_flops(self.tokens(), float(self._lengths().mean()))

    def _lengths(self) -> np.ndarray[Any, Any]:
        """Of the sequences that are trained on."""
        lengths = self.split.lengths
        return lengths[lengths == self.config.model.block_size] if self.split.windows else lengths

    def _corpus(self, vocab_size: int) -> Split | None:
        """The corpus's training split, if it is here and has so many tokens."""
        data = self.config.data
        folders = [cache_folder(), *map(Path, filter(None, [os.environ.get(FOLDER_VARIABLE)]))]
        if not any((folder / f"{data.source}.txt").exists() for folder in folders):
            return None
        corpus = load_corpus(data, log=quiet)
        dataset = Dataset.build(self.config, corpus, log=quiet)
        return dataset.train if dataset.tokenizer.vocab_size == vocab_size else None

    def _weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """By microgpt's names, float32."""
        model = self.config.model
        draws = self.rng.standard_normal(self.dims.num_params, np.float32)
        return initial_weights(self.dims, draws * np.float32(model.init_std),
                               model.scale_residual_init)  # fmt: skip


def _fitting(config: Config, vocab_size: int, backend: Backend) -> Config:
    """The config, with a smaller batch where that is needed."""
    while True:
        size = config.train.batch_size
        try:
            memory_plan.check(config, Dims.of(config.model, vocab_size), backend)
            return config
        except BackendError:
            if size == 1:
                raise
        config = Config.from_dict(config.to_dict(), [f"train.batch_size={size // 2}"])


def made_up(config: Config, vocab_size: int, rng: np.random.Generator) -> Split:
    """Random tokens, as windows or as documents as long as names are."""
    block_size = config.model.block_size
    if config.data.mode == "stream":
        size = max(TEXT, 4 * block_size)
        flat = rng.integers(0, vocab_size - 1, size).astype(np.uint16)
        starts = np.arange(0, len(flat) - 1, block_size)
        return Split(config, flat, starts, np.minimum(len(flat) - 1 - starts, block_size))
    sizes = rng.integers(*NAMES, TEXT // 10)
    starts = (sizes + 1).cumsum() - sizes - 1  # a BOS before each
    flat = rng.integers(0, vocab_size - 1, int(sizes.sum()) + len(sizes) + 1).astype(np.uint16)
    flat[starts] = flat[-1] = vocab_size - 1
    return Split(config, flat, starts, np.minimum(sizes + 1, block_size))
