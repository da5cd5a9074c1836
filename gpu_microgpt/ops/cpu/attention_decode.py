"""The KV cache, and attention of one new position a sequence over it.

y = softmax(scale q k^T) v over the positions 0..length, scale = 1 / sqrt(D).

qkv (S, 3C), read as (S, 3, H, D); keys, values (S, H, T, D): what a sequence and head needs lies in
one piece, and each number of it is read once, so the time is that of reading the cache. Per
sequence and head: the scores (keys,) as a product with few rows, the softmax along them, then the
sum of the values' rows, in FOUR chains of additions, since one would wait for itself.
"""

from __future__ import annotations

import math
from typing import Any

from ...types import Array
from .compile import compiled
from .dots import product_of_few
from .instructions import ATTENTION_DECODE, CACHE_KV, Instructions
from .rows import copy_row
from .tile import STORE
from .vector import (
    at,
    fma,
    keep_below,
    lanes,
    load_some,
    splat,
    store_some,
    vexp,
    vmax,
    vmax_of,
    vsum,
)

FOUR = 4  # rows of values a step


def cache_kv(
    self: Instructions, keys: Array, values: Array, qkv: Array, sequences: Array, positions: Array
) -> None:
    """keys[s, :, t] = k, values[s, :, t] = v for each row's sequence s and position t."""
    arrays = (keys, values, qkv, sequences, positions)
    self.do(CACHE_KV, len(qkv), *arrays, *keys.shape[1:])


def attention_decode(
    self: Instructions, y: Array, qkv: Array, keys: Array, values: Array, lengths: Array
) -> None:
    """y = softmax(q k^T / sqrt(D)) v over each sequence's positions 0..lengths."""
    (p,) = self.scratch(y.dtype, *decode_scratch(keys.shape[2]))
    self.do(ATTENTION_DECODE, len(y), y, qkv, keys, values, lengths, p, *keys.shape[1:])


def decode_scratch(block_size: int) -> tuple[tuple[int, ...], ...]:
    """Probabilities of one head."""
    return ((block_size,),)


@compiled
def keep_kv(
    keys: Any, values: Any, qkv: Any, sequences: Any, positions: Any, rows: Any, n_head: Any,
    longest: Any, width: Any,
) -> None:  # fmt: skip
    """All rows; sequences and positions (N,) are ids, the others places."""
    channels = n_head * width
    for row in range(rows):
        sequence, position = int(sequences[row]), int(positions[row])
        for head in range(n_head):
            to = ((sequence * n_head + head) * longest + position) * width
            k = at(qkv, row * 3 * channels + channels + head * width)
            copy_row(at(keys, to), k, width)
            copy_row(at(values, to), at(k, channels), width)


@compiled
def decode(
    y: Any, qkv: Any, keys: Any, values: Any, lengths: Any, p: Any, first: Any, last: Any,
    n_head: Any, longest: Any, width: Any,
) -> None:  # fmt: skip
    """The heads from `first` to before `last`, of all sequences' heads one after another; lengths
    (S,) are ids, the others places, p (T,).

    A full sequence's lengths are read as if it had room for one position less: a helper (team.py)
    that comes too late may meet them, and must stay inside the cache.
    """
    for pair in range(first, last):
        sequence, head = divmod(pair, n_head)
        count = min(int(lengths[sequence]) + 1, longest)
        cache = pair * longest * width
        q = at(qkv, (sequence * 3 * n_head + head) * width)
        product_of_few(STORE, 1, count, width, q, at(keys, cache), p, p, count)
        total = _softmax(p, count, 1 / math.sqrt(width))
        _weighted(p, at(values, cache), count, width, 1 / total, at(y, pair * width))


@compiled
def _softmax(p: Any, count: Any, scale: Any) -> Any:
    """Scores p (count,) become exp(scale (score - the largest)); returns their sum."""
    m = splat(p, -math.inf)
    for i in range(0, count, lanes(p)):
        m = vmax(m, load_some(p, i, count - i, -math.inf))
    low = splat(p, -vmax_of(m) * scale)
    sums = splat(p, 0)
    for i in range(0, count, lanes(p)):
        e = keep_below(vexp(fma(load_some(p, i, count - i, 0), scale, low)), count - i, 0)
        store_some(p, i, e, count - i)
        sums += e
    return vsum(sums)


@compiled
def _weighted(p: Any, v: Any, count: Any, width: Any, part: Any, y: Any) -> None:
    """y (width,) = part sum of p_t v_t, v (count, width)."""
    for j in range(0, width, lanes(v)):
        n = width - j
        a, b, c, d = splat(v, 0), splat(v, 0), splat(v, 0), splat(v, 0)
        whole = count // FOUR * FOUR
        for t in range(0, whole, FOUR):
            i = t * width + j
            a = fma(load_some(v, i, n, 0), p[t], a)
            b = fma(load_some(v, i + width, n, 0), p[t + 1], b)
            c = fma(load_some(v, i + 2 * width, n, 0), p[t + 2], c)
            d = fma(load_some(v, i + 3 * width, n, 0), p[t + 3], d)
        for t in range(whole, count):
            a = fma(load_some(v, t * width + j, n, 0), p[t], a)
        store_some(y, j, ((a + b) + (c + d)) * part, n)
