"""The update over flat buffers: global norm, clipping, Adam (Kingma & Ba 2015) and AdamW."""

from __future__ import annotations

from ...types import Array
from .context import BLOCK, Context


def global_norm(self: Context, norm: Array, grads: Array) -> None:
    """norm = sqrt(sum(grads^2)), summed in float64 over pieces in a fixed order."""
    total = 0.0
    for start in range(0, len(grads), BLOCK):
        piece = grads[start : start + BLOCK]
        total += float(self.xp.vdot(piece, piece))
    norm[0] = total**0.5


def clip_scale(self: Context, scale: Array, norm: Array, max_norm: float) -> None:
    """scale = min(1, max_norm / norm) (Pascanu et al. 2013)."""
    scale[0] = min(1.0, max_norm / max(float(norm[0]), 1e-12))


def adamw(
    self: Context, params: Array, m: Array, v: Array, copy: Array | None, grads: Array,
    scalars: Array, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One step of Adam, decoupled weight decay (Loshchilov & Hutter 2019) where it is not 0.

    Weight decay acts on all weights, embeddings too, as nanoGPT's does on matrices.

    g = clip grads; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
    params -= rate (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay params).
    `scalars` (4,) holds rate, 1 - beta1^t, 1 - beta2^t and the clip scale. `copy`, if any, becomes
    the new params in its own dtype.
    """
    xp = self.xp
    rate, correction1, correction2, clip = (float(x) for x in scalars)
    for start in range(0, len(params), BLOCK):
        p, mean, square, g = (x[start : start + BLOCK] for x in (params, m, v, grads))
        (a,) = self.scratch(p.dtype, p.shape)
        xp.multiply(g, clip * (1 - beta1), out=a)
        mean *= beta1
        mean += a
        xp.multiply(g, clip * (1 - beta2) ** 0.5, out=a)  # before squaring: no overflow
        xp.multiply(a, a, out=a)
        square *= beta2
        square += a
        xp.sqrt(square, out=a)
        a += eps * correction2**0.5
        xp.divide(mean, a, out=a)
        a *= rate * correction2**0.5 / correction1
        if weight_decay:
            p *= 1 - rate * weight_decay
        p -= a
        if copy is not None:
            copy[start : start + BLOCK] = p


def adamw_scratch(size: int) -> tuple[tuple[int, ...], ...]:
    """Scratch shapes at most wanted here, for flat buffers of `size` numbers."""
    return ((min(size, BLOCK),),)
