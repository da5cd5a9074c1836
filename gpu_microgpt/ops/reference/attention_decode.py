"""The KV cache, and attention of one new position a sequence over it."""

from __future__ import annotations

from ...types import Array
from .context import Context
from .softmax import softmax


def cache_kv(
    self: Context, keys: Array, values: Array, qkv: Array, sequences: Array, positions: Array
) -> None:
    """keys[s, :, t] = k, values[s, :, t] = v for each row's sequence s and position t."""
    _, k, v = qkv.reshape(len(qkv), 3, keys.shape[1], keys.shape[3]).transpose(1, 0, 2, 3)
    keys[sequences, :, positions] = k
    values[sequences, :, positions] = v


def attention_decode(
    self: Context, y: Array, qkv: Array, keys: Array, values: Array, lengths: Array
) -> None:
    """y = softmax(q k^T / sqrt(D)) v over each sequence's positions 0..lengths."""
    xp = self.xp
    size, heads, _, width = keys.shape
    q = qkv.reshape(size, 3, heads, width)[:, 0]
    longest = int(lengths.max()) + 1
    p = (keys[:, :, :longest] @ (q * width**-0.5)[..., None])[..., 0]  # (S, H, longest)
    seen = xp.arange(longest) <= lengths[:, None, None]
    xp.copyto(p, -xp.inf, where=~seen)
    softmax(self, p, p)
    xp.matmul(p[:, :, None], values[:, :, :longest], out=y.reshape(size, heads, 1, width))
