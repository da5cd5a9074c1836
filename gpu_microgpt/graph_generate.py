"""Writing text on a GPU: a token of all texts is one captured graph, which asks the host nothing.

Sampled tokens stay on the device, where the next replay reads them; text comes back in blocks, one
of which is under way while the one before is read. The host counts along: it knows each text's
length, and so when a full context slides, without asking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from .activations import Activations
from .backend.cuda import CudaBackend
from .backend.gpu import Download, Gpu, Graph
from .data.batch import Batch, Layout, Run
from .generate import PhiloxUniforms, Sampling, Uniforms, check_contexts
from .graph_step import cuda_ops
from .kv_cache import KVCache, prefill_rows
from .model import GPT

BLOCK = 32  # tokens of a text that come back together
FIRST_BLOCK = 4  # so that reading can begin soon; the next have twice as many each


def repeat(gpu: Gpu, graph: Graph | None, work: Callable[[], None]) -> Graph:
    """Enqueue work on fixed arrays; return the graph to give the next time, None the first time.

    The first time it is done and captured behind that: so no kernel is first loaded, and no
    product first planned, while capturing.
    """
    if graph is None:
        work()
        return gpu.capture(work)
    graph.launch()
    return graph


class Prefill:
    """Reads stretches of text into a KV cache, by one graph for all numbers and lengths of them.

    Rows and sequences that a batch leaves over belong to no text, and are empty.
    """

    def __init__(
        self, model: GPT, memory: Activations, cache: KVCache, backend: CudaBackend
    ) -> None:
        """Work in this memory, between other uses of it; at least block_size rows."""
        self.model, self.memory, self.cache, self.gpu = model, memory, cache, backend.gpu
        rows, sequences = memory.capacity, len(cache.lengths)
        tokens, positions, self._owners = (backend.zeros((rows,), "i4") for _ in range(3))
        offsets = backend.zeros((sequences + 1,), "i4")
        layout = Layout(offsets, (Run(0, sequences, model.dims.block_size),))
        self._batch = Batch(tokens, tokens, positions, layout, num_targets=0)  # targets: not read
        self._places = (tokens, positions, self._owners, offsets)
        self._graph: Graph | None = None

    def read(self, windows: Mapping[int, Sequence[int]]) -> None:
        """Enqueue caching up to block_size tokens as the first positions of each sequence.

        cache.lengths stay as they are.
        """
        part: list[tuple[int, Sequence[int]]] = []
        rows = 0
        for sequence, window in windows.items():
            if rows + len(window) > self.memory.capacity:
                self._read_together(part)
                part, rows = [], 0
            if len(window):
                part.append((sequence, window))
                rows += len(window)
        if part:
            self._read_together(part)

    def _read_together(self, part: Sequence[tuple[int, Sequence[int]]]) -> None:
        tokens, positions, owners, offsets = (np.zeros(a.shape, np.int32) for a in self._places)
        owners.fill(-1)
        end = 0
        for i, (sequence, window) in enumerate(part):
            start, end = end, end + len(window)
            tokens[start:end], owners[start:end] = window, sequence
            positions[start:end] = np.arange(len(window))
            offsets[i + 1 :] = end
        hosts = (tokens, positions, owners, offsets)
        for place, host in zip(self._places, hosts, strict=True):
            self.gpu.upload(place, host)
        self._graph = repeat(self.gpu, self._graph, self._forward)

    def _forward(self) -> None:
        """What is captured; the logits are computed in vain."""
        self.model.prefill(self.memory, self._batch, self.cache, self._owners)


@dataclass(frozen=True)
class Block:
    """New tokens `first` to `first + count` of every text, on their way to the host."""

    ring: Download  # (BLOCK, S) int32
    first: int
    count: int

    def tokens(self) -> list[np.ndarray[Any, Any]]:
        """(S,) int32 each, waited for; -1: the text had ended."""
        ring = self.ring.wait()
        return [ring[at % BLOCK].copy() for at in range(self.first, self.first + self.count)]


class GraphGenerator:
    """`generate.Generator` on a GPU: the same texts, prompts and sliding window.

    Graphs are kept for further runs; the settings of sampling and the seed are part of them.
    """

    def __init__(self, model: GPT, backend: CudaBackend, sequences: int) -> None:
        """Take memory for `sequences` texts."""
        self.model, self.backend, self.gpu = model, backend, backend.gpu
        self.sequences, self.block_size = sequences, model.dims.block_size
        self.cache = KVCache(model.dims, sequences, backend)
        rows = prefill_rows(self.block_size, sequences)
        self.memory = Activations(model.dims, rows, backend, training=False, sequences=sequences)
        self._prefill = Prefill(model, self.memory, self.cache, backend)
        self._tokens, self._numbers, self._positions, self._ended = (
            backend.zeros((sequences,), "i4") for _ in range(4)
        )
        self._uniforms = backend.zeros((sequences,), "f8")  # where the host draws them
        self._out = backend.zeros((BLOCK, sequences), "i4")
        self._known: tuple[Sampling, int | None] | None = None  # what the following is of
        self._graph: Graph | None = None

    def run(
        self, contexts: Sequence[np.ndarray[Any, Any]], sampling: Sampling, uniforms: Uniforms
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the next tokens (S,) int32 of all texts, until all have ended; -1: had ended.

        contexts: one (n >= 1,) int32 array for each of the S sequences, else ValueError; only the
        last block_size tokens are read. Uniforms other than `PhiloxUniforms` are asked for one
        token after the other, as they are used, which makes each wait for the one before.
        """
        check_contexts(contexts, self.sequences)
        texts = [context[-self.block_size :].tolist() for context in contexts]
        lengths = self._begin(texts, sampling, uniforms)
        ended = np.zeros(self.sequences, bool)
        one_by_one = not isinstance(uniforms, PhiloxUniforms)
        enqueued, size = 0, 1 if one_by_one else FIRST_BLOCK
        ahead: Block | None = None
        while True:
            room = self.block_size - int(lengths.max())
            count, block = min(size, sampling.max_tokens - enqueued, room), None
            if count:
                block = self._write(enqueued, count, sampling, uniforms)
                lengths += count
                enqueued, size = enqueued + count, 1 if one_by_one else min(2 * size, BLOCK)
            if one_by_one:
                ahead, block = block, None
            if ahead is not None:
                for tokens in ahead.tokens():
                    ended |= tokens == stop_of(sampling)
                    for text, token in zip(texts, tokens.tolist(), strict=True):
                        text.append(token)
                    yield tokens
                    if ended.all():
                        return
            elif block is None:  # all tokens are here
                if enqueued == sampling.max_tokens:
                    return
                self._slide(texts, lengths, ended)
            ahead = block

    def _begin(
        self, texts: Sequence[list[int]], sampling: Sampling, uniforms: Uniforms
    ) -> np.ndarray[Any, Any]:
        """Read all but the newest token of each text; return how many those are, (S,) int32."""
        settings = (replace(sampling, max_tokens=1), seed_of(uniforms))
        if self._known != settings:
            self._known, self._graph = settings, None
        if isinstance(uniforms, PhiloxUniforms):
            self.gpu.upload(self._numbers, np.array(uniforms.numbers, np.int32))
        self._prefill.read({s: text[:-1] for s, text in enumerate(texts)})
        lengths = np.array([len(text) - 1 for text in texts], np.int32)
        self.gpu.upload(self.cache.lengths, lengths)
        self.gpu.upload(self._tokens, np.array([text[-1] for text in texts], np.int32))
        self.gpu.zero(self._positions)
        self.gpu.zero(self._ended)
        return lengths

    def _write(self, first: int, count: int, sampling: Sampling, uniforms: Uniforms) -> Block:
        """Enqueue so many tokens more, and their way to the host."""
        work = partial(self._one_token, sampling, seed_of(uniforms))
        for position in range(first, first + count):
            self._graph = repeat(self.gpu, self._graph, work)
            if not isinstance(uniforms, PhiloxUniforms):
                self.gpu.upload(self._uniforms, np.array(uniforms(position), np.float64))
                ops, logits = cuda_ops(self.memory), self.memory.rows(self.sequences).logits
                ops.sample(self._tokens, logits, self._uniforms, *heat_of(sampling))
                self._emit(sampling)
        return Block(self.gpu.download(self._out), first, count)

    def _one_token(self, sampling: Sampling, seed: int | None) -> None:
        """What is captured: from each text's newest token to the next, or to its logits only where
        the host draws."""
        ops = cuda_ops(self.memory)
        logits = self.model.decode(self.memory, self._tokens, self.cache)
        if sampling.never is not None:
            ops.forbid(logits, sampling.never)
        if seed is not None:
            draws = (seed, self._numbers, self._positions)
            ops.sample_philox(self._tokens, logits, *draws, *heat_of(sampling))
            self._emit(sampling)

    def _emit(self, sampling: Sampling) -> None:
        """Write the tokens down and count them."""
        counts = (self.cache.lengths, self._positions)
        cuda_ops(self.memory).emit(self._out, self._ended, self._tokens, *counts, stop_of(sampling))

    def _slide(
        self,
        texts: Sequence[list[int]],
        lengths: np.ndarray[Any, Any],
        ended: np.ndarray[Any, Any],
    ) -> None:
        """Make room in full sequences: keep the newer half (before the last, unread token).

        Texts that have ended make room as well, but nothing is read for them.
        """
        keep, full = self.block_size // 2, lengths == self.block_size
        lengths[full] = keep
        going_on = np.flatnonzero(full & ~ended).tolist()
        self._prefill.read({s: texts[s][-1 - keep : -1] for s in going_on})
        self.gpu.upload(self.cache.lengths, lengths)


def heat_of(sampling: Sampling) -> tuple[float, int, float]:
    """As the operations take it."""
    return sampling.temperature, sampling.top_k, sampling.top_p


def stop_of(sampling: Sampling) -> int:
    """The token that ends a text; -1: none."""
    return -1 if sampling.stop is None else sampling.stop


def seed_of(uniforms: Uniforms) -> int | None:
    """Where the GPU draws; None where the host does."""
    return uniforms.seed if isinstance(uniforms, PhiloxUniforms) else None
