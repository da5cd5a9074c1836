"""Draw the next token, on the CPU: temperature, top-k, top-p, then the inverse of the cumulative
distribution.

logits (S, V); uniforms (S,) float64; tokens (S,) int32. The same tokens as the reference draws from
the same uniforms, but where a draw falls on the border of two: exp is `vexp`, not NumPy's. The sums
are in float64, in the reference's order.

Top-k and top-p need the likeliest in order, but seldom all V: a heap gives one after the other, so
that k of V take V + k log V steps and no sort. What ranks behind the last one is zeroed. (Where a
flat distribution over 50,000 tokens keeps nearly all, the sort is faster: 1.3 times, 2.8 if all are
equal.)
The mass top_p refers to is the sum over what top_k left, without top_k that over the whole row: by
id here and by rank in the reference, which may differ in the last bit of a float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...types import Array
from ..reference.sample import GREEDY, draws
from .compile import compiled
from .instructions import SAMPLE, Instructions
from .rows import largest_of, sum_of
from .vector import at, lanes, load, load_some, store, store_some, vexp


@compiled
def weigh_row(x: Any, temperature: Any, vocab: Any) -> None:
    """x = exp((x - largest) / temperature)."""
    largest = largest_of(x, vocab)
    width = lanes(x)
    whole = vocab // width * width
    for j in range(0, whole, width):
        store(x, j, vexp((load(x, j) - largest) / temperature))
    if whole < vocab:
        rest = vocab - whole
        store_some(x, whole, vexp((load_some(x, whole, rest, 0) - largest) / temperature), rest)


@compiled
def first_largest(x: Any, vocab: Any) -> Any:
    """The first of the largest; of NaN the first, as NumPy's argmax."""
    best = 0
    for i in range(vocab):
        if not x[i] <= x[best]:
            best = i
            if x[i] != x[i]:
                return i
    return best


@compiled
def draw_row(weights: Any, draw: Any, vocab: Any) -> Any:
    """The first id up to which the weights add up to more than `draw` of their sum."""
    wanted = draw * sum_of(weights, vocab)
    cumulative = 0.0
    for i in range(vocab):
        cumulative += weights[i]
        if not cumulative <= wanted:  # of NaN the first
            return i
    return vocab - 1


@compiled
def _before(weights: Any, i: Any, j: Any) -> Any:
    """Whether i ranks before j: it is larger, or as large with a lower id."""
    return weights[i] > weights[j] or (weights[i] == weights[j] and i < j)


@compiled
def _sink(heap: Any, size: Any, weights: Any, slot: Any) -> None:
    """Let the id at `slot` down to where no id below ranks before it."""
    moving = heap[slot]
    child = 2 * slot + 1
    while child < size:
        if child + 1 < size and _before(weights, heap[child + 1], heap[child]):
            child += 1
        if not _before(weights, heap[child], moving):
            break
        heap[slot] = heap[child]
        slot, child = child, 2 * child + 1
    heap[slot] = moving


@compiled
def _next(heap: Any, size: Any, weights: Any) -> Any:
    """Take the first of `size` ids out of the heap; it is left behind them."""
    first = heap[0]
    heap[0] = heap[size - 1]
    heap[size - 1] = first
    _sink(heap, size - 1, weights, 0)
    return first


@compiled
def keep_likely_row(weights: Any, heap: Any, top_k: Any, top_p: Any, vocab: Any) -> None:
    """Zero the weights outside the k likeliest and outside the nucleus of mass top_p.

    heap (vocab,) int32: scratch.
    """
    for i in range(vocab):
        heap[i] = i
    for slot in range(vocab // 2 - 1, -1, -1):
        _sink(heap, vocab, weights, slot)
    limit = min(top_k, vocab) if top_k > 0 else vocab
    mass = sum_of(weights, vocab)
    if top_k > 0:
        mass = 0.0
        for taken in range(limit):
            mass += weights[_next(heap, vocab - taken, weights)]
    cumulative, last = 0.0, heap[0]
    for taken in range(limit):  # those of top_k lie in order, from the heap's end down
        i = heap[vocab - 1 - taken] if top_k > 0 else _next(heap, vocab - taken, weights)
        cumulative += weights[i]
        if cumulative - weights[i] >= top_p * mass:
            break
        last = i
    cut = weights[last]
    for i in range(vocab):
        if weights[i] < cut or (weights[i] == cut and i > last):
            weights[i] = 0


@compiled
def sample_row(
    x: Any, heap: Any, draw: Any, temperature: Any, top_k: Any, top_p: Any, vocab: Any
) -> Any:
    """The token drawn from one row of logits, which are overwritten."""
    if temperature < GREEDY:
        return first_largest(x, vocab)
    weigh_row(x, temperature, vocab)
    if 0 < top_k < vocab or top_p < 1:
        keep_likely_row(x, heap, top_k, top_p, vocab)
    return draw_row(x, draw, vocab)


@compiled
def sample_rows(
    tokens: Any, logits: Any, uniforms: Any, heap: Any, temperature: Any, top_k: Any, top_p: Any,
    rows: Any, vocab: Any,
) -> None:  # fmt: skip
    """The rows of `sample`; logits are a place, tokens, uniforms and heap (V,) int32 numbers."""
    for s in range(rows):
        row = at(logits, s * vocab)
        tokens[s] = sample_row(row, heap, uniforms[s], temperature, top_k, top_p, vocab)


def sample(
    self: Instructions, tokens: Array, logits: Array, uniforms: Array, temperature: float,
    top_k: int, top_p: float,
) -> None:  # fmt: skip
    """Invert the cumulative distribution at `uniforms`; temperature ~0 takes the largest logit."""
    vocab = logits.shape[1]
    (heap,) = self.scratch(np.int32, (vocab,))
    arrays = (logits, tokens, uniforms, heap)
    self.do(SAMPLE, len(logits), *arrays, float(temperature), top_k, float(top_p), vocab)


def sample_philox(
    self: Instructions, tokens: Array, logits: Array, seed: int, numbers: Array, positions: Array,
    temperature: float, top_k: int, top_p: float,
) -> None:  # fmt: skip
    """The same at the draws of the texts with these numbers, for these positions in them."""
    uniforms = draws(seed, numbers, positions)
    sample(self, tokens, logits, uniforms, temperature, top_k, top_p)


def sample_scratch(vocab: int) -> tuple[tuple[int, ...], ...]:
    """Scratch shapes at most wanted here, of int32."""
    return ((vocab,),)
