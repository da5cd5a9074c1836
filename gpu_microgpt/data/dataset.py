"""A corpus as tokens, split in two, cut into samples, and the batch of every step.

Samples are not stored: there is one flat token array and, for each sample, where it starts and how
many rows it has. In documents mode neighbours share the BOS between them: BOS line BOS line BOS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from ..config import Config
from ..errors import DataError
from ..rng import MicrogptRandom, Stream, permute, uniform
from .batch import Batch, gather
from .corpus import Corpus
from .tokenizer import CharTokenizer

_DRAWS = 4096  # random offsets drawn at a time


@dataclass(frozen=True)
class Dataset:
    """The tokenizer, what is trained on, and what is held out (None: nothing)."""

    tokenizer: CharTokenizer
    train: Split
    val: Split | None

    @classmethod
    def build(
        cls,
        config: Config,
        corpus: Corpus,
        *,
        tokenizer: CharTokenizer | None = None,
        log: Callable[[str], None] = print,
    ) -> Dataset:
        """Tokenize and split as `config` says; `tokenizer`: an existing one, else of this text.

        Raises DataError for a text that is too short, or has characters the tokenizer has not.
        """
        build = _documents if config.data.mode == "documents" else _stream
        return build(config, corpus, tokenizer, log)


class Split:
    """Samples `flat[start : start + length + 1]`: `length` inputs, as many targets."""

    flat: np.ndarray  # (M,) uint16 tokens
    starts: np.ndarray  # (S,) int64: where each sample begins in `flat`
    lengths: np.ndarray  # (S,) int64: its rows
    windows: bool  # samples are windows of block_size, but for a shorter one at the end
    samples: int  # that an epoch of training goes through
    num_targets: int  # of all, each once

    def __init__(
        self, config: Config, flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> None:
        """Describe a split. flat: (M,) uint16 tokens; starts, lengths: (S,) int64, together each
        target once."""
        self.config, self.flat, self.starts, self.lengths = config, flat, starts, lengths
        self.windows = config.data.mode == "stream"
        # only full windows are trained on; the rest at the end is scored in `batches`
        block_size = config.model.block_size
        self.samples = int((lengths == block_size).sum()) if self.windows else len(starts)
        self.num_targets = int(lengths.sum())
        self._cached: tuple[int, np.ndarray] = (-1, starts[:0])

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every sample is seen at least once."""
        train = self.config.train
        return -(-self.samples // (train.batch_size * train.grad_accum))

    @property
    def nbytes(self) -> int:
        """Bytes of its tokens, and of where its samples lie."""
        return self.flat.nbytes + self.starts.nbytes + self.lengths.nbytes

    @property
    def choices(self) -> int:
        """What `data.order: random` draws from: every place a window fits, or the samples."""
        return len(self.flat) - self.config.model.block_size if self.windows else self.samples

    def batch(self, step: int, micro: int = 0) -> Batch:
        """Micro-batch `micro` of the 0-based training step: a pure function of (seed, step, micro).

        It takes the samples numbered (step * grad_accum + micro) * batch_size and on of an endless
        sequence: one shuffled epoch after the other, or independent draws.
        """
        train = self.config.train
        first = (step * train.grad_accum + micro) * train.batch_size
        return gather(self.flat, *self._places(first, train.batch_size))

    def sequences(self, step: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """What the batches of so many steps from the 0-based one on are gathered of: starts and
        lengths, (steps, grad_accum, batch_size) int64 each, in the order `batch` takes them."""
        train = self.config.train
        shape = (steps, train.grad_accum, train.batch_size)
        starts, lengths = self._places(step * prod(shape[1:]), prod(shape))
        return starts.reshape(shape), lengths.reshape(shape)

    def batches(self, limit: int = 0) -> Iterator[Batch]:
        """The whole split in batches, each target once; or, where that would be more than `limit`
        batches, always the same `limit` of them, drawn from all over it."""
        return map(self._gather, self.items(limit))

    def items(self, limit: int = 0) -> Iterator[np.ndarray]:
        """The samples of each of those batches, (up to batch_size,) int64."""
        size, total = self.config.train.batch_size, len(self.starts)
        items = np.arange(total)
        if 0 < limit * size < total:
            items = permute(items[: limit * size], total, self.config.seed, Stream.EVAL)
        for first in range(0, len(items), size):
            yield items[first : first + size]

    def draw(self, first: int, count: int) -> np.ndarray:
        """Numbers first .. first + count - 1 of the endless sequence; (count,) int64."""
        period = self.samples if self.config.data.order == "epochs" else _DRAWS
        parts = []
        while count:
            number, offset = divmod(first, period)
            if self._cached[0] != number:
                self._cached = number, self._period(number, period)
            parts.append(self._cached[1][offset : offset + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of what `draw` gives; (count,) int64 each."""
        items = self.draw(first, count)
        if self.windows and self.config.data.order == "random":
            return items, np.full(count, self.config.model.block_size)
        return self.starts[items], self.lengths[items]

    def _gather(self, items: np.ndarray) -> Batch:
        return gather(self.flat, self.starts[items], self.lengths[items])

    def _period(self, number: int, period: int) -> np.ndarray:
        """One epoch's order, or as many draws; (period,) int64."""
        config = self.config
        index = np.arange(period)
        if config.rng == "microgpt":
            return np.array(MicrogptRandom(config.seed, period, 0, 0.0).order)
        if config.data.order == "epochs":
            return permute(index, period, config.seed, Stream.ORDER, number)
        draws = uniform(config.seed, Stream.ORDER, index + number * period)
        return (draws * self.choices).astype(np.int64)


def _documents(
    config: Config, corpus: Corpus, tokenizer: CharTokenizer | None, log: Callable[[str], None]
) -> Dataset:
    """A line is a document, as microgpt.py reads them: stripped, empty ones dropped."""
    lines = [line for raw in corpus.text.split("\n") if (line := raw.strip())]
    text = "".join(lines)
    tokenizer = tokenizer or CharTokenizer(text)
    sizes = np.array([len(line) for line in lines], np.int64)
    before = np.arange(1, len(lines) + 1)  # BOS tokens before each document's first character
    flat = np.full(len(text) + len(lines) + 1, tokenizer.bos, np.uint16)
    flat[np.arange(len(text)) + before.repeat(sizes)] = tokenizer.encode(text, str(corpus.path))
    starts = sizes.cumsum() - sizes + before - 1
    block_size = config.model.block_size
    cut = int((sizes + 1 > block_size).sum())
    if cut:
        log(f"{cut:,} of {len(lines):,} documents are cut to block_size {block_size} tokens")
    lengths = np.minimum(sizes + 1, block_size)

    fraction = config.data.val_fraction
    num_held = round(fraction * len(lines))
    if num_held >= len(lines) or (fraction and not num_held):
        raise DataError(
            f"{corpus.path}: got {len(lines)} documents, too few to hold out a share of "
            f"{fraction:g} and train on the others: use a longer text or another "
            "data.val_fraction (0: none)"
        )
    if not fraction:
        return Dataset(tokenizer, Split(config, flat, starts, lengths), None)
    held = np.zeros(len(lines), bool)
    held[permute(np.arange(num_held), len(lines), config.seed, Stream.SPLIT)] = True
    train, val = (Split(config, flat, starts[part], lengths[part]) for part in (~held, held))
    return Dataset(tokenizer, train, val)


def _stream(
    config: Config, corpus: Corpus, tokenizer: CharTokenizer | None, log: Callable[[str], None]
) -> Dataset:
    """Running text without BOS; its end is held out."""
    tokenizer = tokenizer or CharTokenizer(corpus.text)
    flat = tokenizer.encode(corpus.text, str(corpus.path)).astype(np.uint16)
    fraction, block_size = config.data.val_fraction, config.model.block_size
    num_held = round(fraction * len(flat))
    num_train = len(flat) - num_held
    if num_train < block_size + 1:
        raise DataError(
            f"{corpus.path}: got {num_train:,} characters to train on (of {len(flat):,}), wanted "
            f"at least a window of block_size + 1 = {block_size + 1:,}: use a longer text or a "
            "smaller model.block_size"
        )
    if fraction and num_held < 2:
        raise DataError(
            f"{corpus.path}: got {num_held} characters to hold out, wanted at least 2: use a "
            "longer text or another data.val_fraction (0: none)"
        )
    train, held = (_windows(config, part) for part in (flat[:num_train], flat[num_train:]))
    return Dataset(tokenizer, train, held if fraction else None)


def _windows(config: Config, flat: np.ndarray) -> Split:
    """Windows of block_size + 1 tokens that overlap by one; the last may be shorter."""
    block_size = config.model.block_size
    starts = np.arange(0, max(len(flat) - 1, 0), block_size)
    return Split(config, flat, starts, np.minimum(len(flat) - 1 - starts, block_size))
