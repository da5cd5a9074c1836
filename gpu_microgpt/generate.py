"""Writing text: a KV-cached loop over batches of prompts, past block_size by a sliding window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .activations import Activations
from .backend import Backend
from .data.batch import Batch, gather
from .errors import UserError
from .kv_cache import KVCache
from .model import GPT
from .rng import Stream, uniform

MAX_HEAT = 1e6  # all tokens are as good as equal long before
DRAWS = 256  # uniforms drawn at a time for one text

Uniforms = Callable[[int], np.ndarray[Any, Any]]  # position in the new text -> (S,) in [0, 1)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a text ends."""

    max_tokens: int
    temperature: float = 1.0  # 0: always the likeliest
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    stop: int | None = None  # ends a text
    never: int | None = None  # is not drawn

    def __post_init__(self) -> None:
        """Raise UserError for settings no text can be drawn with."""
        for name, fits, wanted in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= MAX_HEAT, f"from 0 (greedy) to {MAX_HEAT:g}"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
        ):
            if not fits:
                raise UserError(f"{name}: got {getattr(self, name)}, wanted {wanted}")


class Generator:
    """Continues S contexts side by side: prompts once, then one position a token and text.

    When a text fills the context, the older half is dropped and the rest read again: positions are
    learned and begin at 0, so cached keys cannot simply move. That reads each token twice at most.
    """

    def __init__(self, model: GPT, backend: Backend, sequences: int) -> None:
        """Take memory for `sequences` texts."""
        self.model, self.backend = model, backend
        self.sequences, self.block_size = sequences, model.dims.block_size
        self.cache = KVCache(model.dims, sequences, backend)
        rows = max(self.block_size, sequences)
        self.memory = Activations(model.dims, rows, backend, training=False)

    def run(
        self, contexts: Sequence[np.ndarray[Any, Any]], sampling: Sampling, uniforms: Uniforms
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the next tokens (S,) int32 of all texts, until all have ended; -1: had ended.

        contexts: one (n >= 1,) int32 array for each of the S sequences, else ValueError; only the
        last block_size tokens are read.
        """
        check_contexts(contexts, self.sequences)
        texts = [list(context) for context in contexts]
        logits = self._read([text[-self.block_size :] for text in texts], range(len(texts)))
        ended = np.zeros(len(texts), bool)
        for position in range(sampling.max_tokens):
            tokens = self._draw(logits, sampling, uniforms(position))
            yield np.where(ended, -1, tokens)
            if sampling.stop is not None:
                ended |= tokens == sampling.stop
            if ended.all() or position + 1 == sampling.max_tokens:
                return
            for text, token in zip(texts, tokens.tolist(), strict=True):
                text.append(token)
            self._slide(texts)
            logits = self.model.decode(self.memory, self.backend.from_host(tokens), self.cache)
            self.cache.lengths += 1

    def _draw(
        self, logits: Any, sampling: Sampling, uniforms: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        if sampling.never is not None:
            logits[:, sampling.never] = -np.inf
        tokens = self.backend.empty((len(logits),), np.int32)
        heat = (sampling.temperature, sampling.top_k, sampling.top_p)
        self.memory.ops.sample(tokens, logits, self.backend.from_host(uniforms), *heat)
        return self.backend.to_host(tokens)

    def _slide(self, texts: list[list[int]]) -> None:
        """Make room in full sequences: keep the newer half (before the last, unread token)."""
        keep = self.block_size // 2
        lengths = self.backend.to_host(self.cache.lengths)
        full = np.flatnonzero(lengths == self.block_size).tolist()
        if not full:
            return
        self.cache.lengths[full] = 0
        if keep:
            self._read([texts[i][-1 - keep : -1] for i in full], full)

    def _read(self, windows: Sequence[Sequence[int]], sequences: Sequence[int]) -> Any:
        """Cache the windows, as many together as fit; return the logits (len, V) after each."""
        last = self.backend.empty((len(windows), self.model.dims.vocab_size), self.backend.dtype)
        first = 0
        while first < len(windows):
            end, rows = first + 1, len(windows[first])
            while end < len(windows) and rows + len(windows[end]) <= self.memory.capacity:
                rows += len(windows[end])
                end += 1
            self._read_together(windows[first:end], np.array(sequences[first:end]), last[first:end])
            first = end
        return last

    def _read_together(
        self, windows: Sequence[Sequence[int]], sequences: np.ndarray[Any, Any], last: Any
    ) -> None:
        lengths = np.array([len(window) for window in windows])
        flat = np.concatenate([*windows, [0]]).astype(np.int32)  # gather also reads a next token
        batch = gather(flat, lengths.cumsum() - lengths, lengths)
        order = lengths.argsort(kind="stable")  # gather's own: shortest first
        owners = sequences[order].repeat(lengths[order]).astype(np.int32)
        logits = self._prefill(batch, owners)
        ends = batch.layout.offsets[1:] - 1
        last[order] = logits[ends]
        self.cache.lengths[sequences] = lengths

    def _prefill(self, batch: Batch, owners: np.ndarray[Any, Any]) -> Any:
        """Cache the batch's rows for the sequences (N,) int32 they belong to; their logits."""
        move = self.backend.from_host
        tokens, positions = move(batch.tokens), move(batch.positions)
        there = Batch(tokens, batch.targets, positions, batch.layout, batch.num_targets)
        return self.model.prefill(self.memory, there, self.cache, owners)


def check_contexts(contexts: Sequence[np.ndarray[Any, Any]], sequences: int) -> None:
    """Raise ValueError unless there is one for each sequence, of at least one token."""
    if len(contexts) != sequences or not all(map(len, contexts)):
        sizes = [len(context) for context in contexts]
        raise ValueError(f"contexts: got lengths {sizes}, wanted {sequences} of at least 1")


class PhiloxUniforms:
    """Uniforms of the texts with these numbers: a text's draws depend on (seed, number) only.

    A GPU draws them itself, from `seed` and `numbers`.
    """

    def __init__(self, seed: int, numbers: Sequence[int]) -> None:
        """Nothing is drawn yet."""
        self.seed, self.numbers = seed, tuple(numbers)
        self._drawn: dict[int, np.ndarray[Any, Any]] = {}  # DRAWS positions each, (DRAWS, S)

    def __call__(self, position: int) -> np.ndarray[Any, Any]:
        """(S,) float64, for a position in the new text."""
        index, row = divmod(position, DRAWS)
        if index not in self._drawn:
            at = np.arange(index * DRAWS, (index + 1) * DRAWS)
            draws = [uniform(self.seed, Stream.SAMPLE, at, number) for number in self.numbers]
            self._drawn[index] = np.stack(draws, axis=1)
        draw: np.ndarray[Any, Any] = self._drawn[index][row]
        return draw
