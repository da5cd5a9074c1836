"""Writing tokens in one compiled call: the decode step, played, and the draw from its logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compile import compiled
from .play import play
from .sample import sample_row
from .vector import at


@compiled
def write_tokens(
    like: Any, program: Any, logits: Any, tokens: Any, lengths: Any, written: Any, ended: Any,
    uniforms: Any, heap: Any, temperature: Any, top_k: Any, top_p: Any, never: Any, stop: Any,
    longest: Any,
) -> Any:  # fmt: skip
    """Draw a token for each of S texts from logits (S, V), decode them, draw again: up to
    len(written) times. Returns how often: until all have ended or a text's cache is full.

    program: decodes tokens (S,) at lengths (S,), both int32, into logits, which are overwritten.
    written (count, S) int32: what was drawn; ended (S,) bool: which texts have ended (they are
    written on until all have); uniforms (count, S) float64; heap (V,) int32: scratch. never, stop:
    ids or -1; longest: positions a cache holds. The last tokens drawn are not decoded: `tokens`
    keeps them.
    """
    size, vocab = logits.shape
    for k in range(len(written)):
        if k > 0:
            play(like, program, size, size)
            lengths += np.int32(1)
        for s in range(size):
            if never >= 0:
                logits[s, never] = -np.inf
            row = at(logits, s * vocab)
            tokens[s] = sample_row(row, heap, uniforms[k, s], temperature, top_k, top_p, vocab)
            written[k, s] = tokens[s]
            if tokens[s] == stop:
                ended[s] = True
        if ended.all() or lengths.max() == longest:
            return k + 1
    return len(written)
