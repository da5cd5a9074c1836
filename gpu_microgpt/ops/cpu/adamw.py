"""The update over flat buffers, on the CPU: global norm, clipping, Adam and AdamW.

    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  g = clip grads
    params -= rate (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay params)

params, m, v, grads (P,) of one dtype. One pass: a vector of each is read once and written once, 28
bytes a weight in float32. The bias corrections are moved out of the root, as in the reference. In
the cache, root and division are what takes the time: so the latter is a `quotient`. The norm sums
squares by the lanes of a vector over CHUNK elements, and these sums in float64.
"""

from __future__ import annotations

import math
from typing import Any

from ...types import Array
from .compile import compiled
from .instructions import ADAMW, CLIP_SCALE, GLOBAL_NORM, Instructions
from .rows import dot
from .vector import at, fma, lanes, load, load_some, quotient, splat, store, store_some, vsqrt

LEAST = 1e-12  # a smaller norm is none
NORMAL = 2.0**-126  # the least number a `quotient` divides by, where a weight had no gradient yet
TINY = 2.0**-64
CHUNK = 4096  # of the lanes' sums in float32 then has at most 128 terms


@compiled
def sum_squares(x: Any, size: Any) -> Any:
    """In float64 from chunk to chunk; x is a place."""
    total = 0.0
    for i in range(0, size, CHUNK):
        total += dot(at(x, i), at(x, i), min(CHUNK, size - i))
    return total


@compiled
def _update(p: Any, m: Any, v: Any, g: Any, factors: Any) -> Any:
    """One vector of each: the new p, m, v."""
    beta1, gain1, beta2, gain2, eps, rate, decay, scale = factors
    g = g * scale
    m = fma(m, beta1, g * gain1)
    a = g * gain2  # before squaring: no overflow
    v = fma(v, beta2, a * a)
    return fma(quotient(m, vsqrt(v) + eps), -rate, p * decay), m, v


@compiled
def adamw_flat(
    params: Any, m: Any, v: Any, grads: Any, scalars: Any, beta1: Any, beta2: Any, eps: Any,
    weight_decay: Any, size: Any,
) -> None:  # fmt: skip
    """All weights; scalars (4,) are float64, params, m, v, grads are places."""
    rate, correction1, correction2, clip = scalars[0], scalars[1], scalars[2], scalars[3]
    root = math.sqrt(correction2)
    scale = TINY if clip < TINY else 1.0  # a huge gradient's clip would not be a normal number
    clip /= scale
    factors = (
        splat(params, beta1), splat(params, clip * (1 - beta1)),
        splat(params, beta2), splat(params, clip * math.sqrt(1 - beta2)),
        splat(params, max(eps * root, NORMAL)), splat(params, rate * root / correction1),
        splat(params, 1 - rate * weight_decay), splat(params, scale),
    )  # fmt: skip
    width = lanes(params)
    whole = size // width * width
    for i in range(0, whole, width):
        new = _update(load(params, i), load(m, i), load(v, i), load(grads, i), factors)
        store(params, i, new[0])
        store(m, i, new[1])
        store(v, i, new[2])
    if whole < size:
        rest = size - whole
        new = _update(
            load_some(params, whole, rest, 0), load_some(m, whole, rest, 0),
            load_some(v, whole, rest, 0), load_some(grads, whole, rest, 0), factors,
        )  # fmt: skip
        store_some(params, whole, new[0], rest)
        store_some(m, whole, new[1], rest)
        store_some(v, whole, new[2], rest)


@compiled
def norm_of(grads: Any, size: Any) -> Any:
    """The root of the sum of squares; grads is a place."""
    return math.sqrt(sum_squares(grads, size))


@compiled
def clip(norm: Any, max_norm: Any) -> Any:
    """min(1, max_norm / norm); NaN stays."""
    factor = max_norm / max(norm, LEAST)
    return 1.0 if factor > 1 else factor


def global_norm(self: Instructions, norm: Array, grads: Array) -> None:
    """norm = sqrt(sum(grads^2)), in a fixed order."""
    self.do(GLOBAL_NORM, 0, grads, norm, grads.size)


def clip_scale(self: Instructions, scale: Array, norm: Array, max_norm: float) -> None:
    """scale = min(1, max_norm / norm) (Pascanu et al. 2013)."""
    self.do(CLIP_SCALE, 0, scale, norm, float(max_norm))


def adamw(
    self: Instructions, params: Array, m: Array, v: Array, copy: Array | None, grads: Array,
    scalars: Array, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One step of Adam, decoupled weight decay (Loshchilov & Hutter 2019) where it is not 0.

    `scalars` (4,) holds rate, 1 - beta1^t, 1 - beta2^t and the clip scale. Raises ValueError for
    a `copy`: products here take the weights themselves.
    """
    if copy is not None:
        raise ValueError("adamw: got a copy of the weights, wanted None: the CPU has no use for it")
    rates = (float(beta1), float(beta2), float(eps), float(weight_decay))
    self.do(ADAMW, 0, params, m, v, grads, scalars, *rates, params.size)
