"""Writing text with compiled kernels: the decode step recorded once, many tokens in one call.

What graph_generate.py is for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .backend.numpy import NumpyBackend
from .compiled_step import compiled_ops
from .compiled_team import Team
from .data.batch import Batch, Layout, Run
from .generate import Generator, PhiloxUniforms, Sampling, Uniforms, check_contexts
from .model import GPT
from .ops.cpu import CompiledOps
from .ops.cpu.decode import write_tokens
from .ops.cpu.packed import PackedWeights
from .ops.cpu.play import play

AHEAD = 64  # tokens of a text in one call: enough to hide what a call costs ...
FIRST = 4  # ... and few at the beginning, so that reading can begin soon


class CompiledGenerator(Generator):
    """`generate.Generator`, and the same texts: only its loop is compiled."""

    def __init__(self, model: GPT, backend: NumpyBackend, sequences: int) -> None:
        """Take memory for `sequences` texts, and record."""
        super().__init__(model, backend, sequences)
        ops = compiled_ops(self.memory)
        self._tokens = backend.zeros((sequences,), "i4")
        with ops.recording() as self._program:
            self._logits = model.decode(self.memory, self._tokens, self.cache)
        self._record_prefill(ops)
        self._weights = PackedWeights(self._program, sequences, backend.zeros)
        self._heap = np.zeros(model.dims.vocab_size, np.int32)
        self._team = Team(backend, self._program, model.dims, sequences)

    def _record_prefill(self, ops: CompiledOps) -> None:
        """For any number of rows, which are brought to where it reads them."""
        rows = self.memory.capacity
        tokens, targets, positions, owners = (np.zeros(rows, np.int32) for _ in range(4))
        offsets = np.zeros(self.sequences + 1, np.int32)
        layout = Layout(offsets, (Run(0, 1, self.block_size),))
        batch = Batch(tokens, targets, positions, layout, -1)
        with ops.recording() as self._reading:
            self._read_logits = self.model.prefill(self.memory, batch, self.cache, owners)
        self._rows = tokens, positions, owners, offsets

    def _prefill(self, batch: Batch, owners: np.ndarray[Any, Any]) -> Any:
        """As Generator._prefill."""
        offsets = batch.layout.offsets
        arrays = batch.tokens, batch.positions, owners, offsets
        for there, array in zip(self._rows, arrays, strict=True):
            there[: len(array)] = array
        program = self._reading
        play(program.like, program.code, len(batch.tokens), len(offsets) - 1)
        return self._read_logits[: len(batch.tokens)]

    def run(
        self, contexts: Sequence[np.ndarray[Any, Any]], sampling: Sampling, uniforms: Uniforms
    ) -> Iterator[np.ndarray[Any, Any]]:
        """As Generator.run, with the weights as they are when it begins."""
        check_contexts(contexts, self.sequences)
        texts = [list(context) for context in contexts]
        self._logits[...] = self._read(
            [text[-self.block_size :] for text in texts], range(len(texts))
        )
        self._weights.pack()
        try:
            yield from self._written(texts, sampling, uniforms)
        finally:
            self._team.close()

    def _written(
        self, texts: list[list[int]], sampling: Sampling, uniforms: Uniforms
    ) -> Iterator[np.ndarray[Any, Any]]:
        """What follows the texts, which have been read."""
        ended = np.zeros(len(texts), bool)
        position, ahead = 0, FIRST if isinstance(uniforms, PhiloxUniforms) else 1
        while True:
            count = min(ahead, sampling.max_tokens - position)
            draws = np.stack([uniforms(position + i) for i in range(count)])
            written = self._write(sampling, draws, ended.copy(), decoded=position == 0)
            stopped = np.vstack([ended, written == sampling.stop]).cumsum(0) > 0
            yield from np.where(stopped[:-1], -1, written)
            ended = stopped[-1]
            position += len(written)
            if ended.all() or position == sampling.max_tokens:
                return
            for text, tokens in zip(texts, written.T, strict=True):
                text += tokens.tolist()
            self._slide(texts)
            ahead = min(2 * ahead, AHEAD) if ahead > 1 else 1

    def _write(
        self, sampling: Sampling, draws: np.ndarray[Any, Any], ended: np.ndarray[Any, Any],
        decoded: bool,
    ) -> np.ndarray[Any, Any]:  # fmt: skip
        """Tokens (count, S) int32 for draws (count, S), or fewer: until all texts have ended, or
        one is full. `ended` (S,) is overwritten; decoded: whether the last tokens are."""
        never, stop = (-1 if token is None else token for token in (sampling.never, sampling.stop))
        written = np.empty(draws.shape, np.int32)
        heat = (float(sampling.temperature), sampling.top_k, float(sampling.top_p))
        program, team = self._program, self._team
        with team:
            count = write_tokens(
                program.like, program.code, self._logits, self._tokens, self.cache.lengths,
                written, ended, draws, self._heap, *heat, never, stop, self.block_size, decoded,
                team.words, team.results,
            )  # fmt: skip
        return written[:count]
