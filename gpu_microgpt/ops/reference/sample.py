"""Draw the next token: temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...rng import Stream, uniform
from ...types import Array
from .context import Context

GREEDY = 1e-6  # a lower temperature would overflow float32, and leaves no choice anyway


def sample(
    self: Context, tokens: Array, logits: Array, uniforms: Array, temperature: float, top_k: int,
    top_p: float,
) -> None:  # fmt: skip
    """Invert the cumulative distribution at `uniforms`; temperature ~0 takes the largest logit.

    top_k keeps the k largest logits; top_p then the fewest tokens whose probabilities add up to
    at least top_p. Equal logits: the lower id comes first.
    """
    xp = self.xp
    if temperature < GREEDY:
        tokens[...] = logits.argmax(-1)
        return
    logits -= logits.max(-1, keepdims=True)
    logits /= temperature
    xp.exp(logits, out=logits)
    if 0 < top_k < logits.shape[1] or top_p < 1:
        _keep_likely(self, logits, top_k, top_p)
    cumulative = logits.cumsum(-1, dtype=xp.float64)
    reached = cumulative <= (uniforms * cumulative[:, -1])[:, None]
    tokens[...] = xp.minimum(reached.sum(-1), logits.shape[1] - 1)


def sample_philox(
    self: Context, tokens: Array, logits: Array, seed: int, numbers: Array, positions: Array,
    temperature: float, top_k: int, top_p: float,
) -> None:  # fmt: skip
    """The same at the draws of the texts with these numbers, for these positions in them."""
    uniforms = self.xp.asarray(draws(seed, numbers, positions))
    sample(self, tokens, logits, uniforms, temperature, top_k, top_p)


def draws(seed: int, numbers: Array, positions: Array) -> np.ndarray[Any, Any]:
    """Uniforms (S,) of the texts with these numbers, for these positions in them."""
    places = zip(positions.tolist(), numbers.tolist(), strict=True)
    return np.array([uniform(seed, Stream.SAMPLE, at, number) for at, number in places])


def _keep_likely(self: Context, weights: Array, top_k: int, top_p: float) -> None:
    """Zero the weights outside the k likeliest and outside the nucleus of mass top_p."""
    xp = self.xp
    order = xp.argsort(-weights, axis=-1, kind="stable")
    ranked = xp.take_along_axis(weights, order, axis=-1)
    if top_k > 0:
        ranked[:, top_k:] = 0
    before = ranked.cumsum(-1, dtype=xp.float64)
    mass = before[:, -1:].copy()
    before -= ranked
    ranked[before >= top_p * mass] = 0
    xp.put_along_axis(weights, order, ranked, axis=-1)
