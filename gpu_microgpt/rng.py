"""Stateless randomness: every draw is a pure function of (seed, stream, index, step).

Nothing is stored, so a resumed run, both backends and any number of ranks draw the same numbers.
The one source of bits is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as
easy as 1, 2, 3", SC 2011). `MicrogptRandom` is the exception: Python's own generator, drawn in the
order of microgpt.py.
"""

from __future__ import annotations

import random
from enum import IntEnum

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key after each round
_ROUNDS = 10
_FEISTEL_ROUNDS = 12
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_NORMAL_CHUNK = 1 << 16  # Philox blocks at a time: keeps the working set in the cache


class Stream(IntEnum):
    """What the numbers are for; streams of one seed are independent of each other."""

    INIT = 0  # initial weights
    ORDER = 1  # which samples are trained on when
    SPLIT = 2  # which documents are held out
    EVAL = 3  # which samples stand for a whole split
    SAMPLE = 4  # generated text


def philox_block(counter: npt.ArrayLike, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters (..., 4) of 32-bit words under two 32-bit key words.

    Returns (..., 4) uint32. A round maps (x0, x1, x2, x3) to
    (hi(M1 x2) ^ x1 ^ k0, lo(M1 x2), hi(M0 x0) ^ x3 ^ k1, lo(M0 x0)).
    """
    x0, x1, x2, x3 = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * x0, _MULTIPLIERS[1] * x2  # 32 x 32 -> 64 bits
        x0, x1, x2, x3 = (
            (p1 >> _SHIFT) ^ x1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ x3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def philox(seed: int, stream: Stream, index: npt.ArrayLike, step: int = 0) -> np.ndarray:
    """Four random 32-bit words for each index (any shape, 0 <= index < 2**63); 0 <= step < 2**32.

    Key (seed's low, high word), counter (index's low, high word, step, stream).
    Returns index.shape + (4,) uint32.
    """
    at = np.asarray(index, np.int64).astype(np.uint64)
    counter = np.empty((*at.shape, 4), np.uint64)
    counter[..., 0] = at & _LOW
    counter[..., 1] = at >> _SHIFT
    counter[..., 2] = step
    counter[..., 3] = int(stream)
    return philox_block(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))


def uniform(seed: int, stream: Stream, index: npt.ArrayLike, step: int = 0) -> np.ndarray:
    """Float64 in the open interval (0, 1), index.shape: (first word + 0.5) / 2**32."""
    return _unit(philox(seed, stream, index, step)[..., 0])


def normal(seed: int, stream: Stream, count: int) -> np.ndarray:
    """Standard normal numbers, (count,) float64; numbers 4i .. 4i+3 come from Philox block i.

    Box and Muller (1958): words (u, v) give sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v).
    """
    blocks = -(-count // 4)
    out = np.empty((blocks, 2, 2))
    for first in range(0, blocks, _NORMAL_CHUNK):
        last = min(first + _NORMAL_CHUNK, blocks)
        words = _unit(philox(seed, stream, np.arange(first, last)))
        radius = np.sqrt(-2.0 * np.log(words[:, 0::2]))
        angle = 2.0 * np.pi * words[:, 1::2]
        out[first:last, :, 0] = radius * np.cos(angle)
        out[first:last, :, 1] = radius * np.sin(angle)
    return out.reshape(-1)[:count]


def permute(
    index: npt.ArrayLike, size: int, seed: int, stream: Stream, epoch: int = 0
) -> np.ndarray:
    """Where a shuffle of range(size) puts each index: a bijection, with no table of `size` kept.

    A Feistel network over the smallest domain 4**h >= size; round r sends (left, right) to
    (right, left ^ F_r(right)), F_r being the low h bits of Philox at right + r * 2**32. A value
    outside range(size) walks on along its cycle until it is inside (Black and Rogaway, 2002).

    index: any shape, 0 <= index < size. Returns int64 of that shape.
    """
    values = np.array(index, np.int64)
    if values.size and not 0 <= values.min() <= values.max() < size:
        raise ValueError(f"permute: wants indices in [0, {size})")
    half = max(1, -(-(size - 1).bit_length() // 2))
    mask = (1 << half) - 1
    # F_r has only 2**h inputs: tabulated once, each round is then a look-up
    inputs = np.arange(1 << half) + (np.arange(_FEISTEL_ROUNDS)[:, None] << 32)
    table = philox(seed, stream, inputs, epoch)[..., 0].astype(np.int64) & mask
    flat = values.reshape(-1)
    walking = np.arange(flat.size)
    while walking.size:
        left, right = flat[walking] >> half, flat[walking] & mask
        for row in table:
            left, right = right, left ^ row[right]
        flat[walking] = left << half | right
        walking = walking[flat[walking] >= size]
    return values


class MicrogptRandom:
    """Python's `random.Random(seed)`, drawn as microgpt.py draws: shuffle, weights, samples."""

    order: list[int]  # document indices, shuffled
    weights: np.ndarray  # (num_params,) float64: gauss(0, std), one after the other

    def __init__(self, seed: int, num_docs: int, num_params: int, std: float) -> None:
        """Shuffle `num_docs` documents, then draw `num_params` weights."""
        self._random = random.Random(seed)
        self.order = list(range(num_docs))
        self._random.shuffle(self.order)
        self.weights = np.array([self._random.gauss(0, std) for _ in range(num_params)])

    def uniform(self) -> float:
        """The next `random()`, in [0, 1): the one draw that `random.choices` makes for one item."""
        return self._random.random()


def _unit(words: np.ndarray) -> np.ndarray:
    """32-bit words as float64 in (0, 1)."""
    return (words + 0.5) * 2.0**-32
