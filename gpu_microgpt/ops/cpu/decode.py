"""Writing tokens in one compiled call: the decode step, played, and the draw from its logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compile import compiled
from .sample import sample_row
from .team import play_together
from .vector import at


@compiled
def write_tokens(
    like: Any, program: Any, logits: Any, tokens: Any, lengths: Any, written: Any, ended: Any,
    uniforms: Any, heap: Any, temperature: Any, top_k: Any, top_p: Any, never: Any, stop: Any,
    longest: Any, decoded: Any, words: Any, results: Any,
) -> Any:  # fmt: skip
    """Draw a token for each of S texts from logits (S, V), decode them, draw again: up to
    len(written) times. Returns how often: until all have ended or a text's cache is full.

    program: decodes tokens (S,) at lengths (S,), both int32, into logits, which are overwritten.
    written (count, S) int32: what was drawn; ended (S,) bool: which texts have ended (they are
    written on until all have); uniforms (count, S) float64; heap (V,) int32: scratch. never, stop:
    ids or -1; longest: positions a cache holds. The last tokens drawn are not decoded: `tokens`
    keeps them, and `decoded` says whether those it holds at first are. words, results: the team's
    (team.py).
    """
    size, vocab = logits.shape
    count = 0
    while count < len(written):
        if count > 0 or not decoded:
            play_together(like, program, size, words, results)
            lengths += np.int32(1)
        for s in range(size):
            if never >= 0:
                logits[s, never] = -np.inf
            row = at(logits, s * vocab)
            tokens[s] = sample_row(row, heap, uniforms[count, s], temperature, top_k, top_p, vocab)
            written[count, s] = tokens[s]
            if tokens[s] == stop:
                ended[s] = True
        count += 1
        if ended.all() or lengths.max() == longest:
            break
    return count
