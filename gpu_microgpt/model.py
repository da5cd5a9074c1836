"""GPT: the equations, forward and backward, line by line.

    x = rmsnorm(wte[tokens] + wpe[positions])
    per layer:  x = x + attn_wo attention(attn_wqkv rmsnorm(x))
                x = x + mlp_fc2 relu(mlp_fc1 rmsnorm(x))
    logits = lm_head x

This is microgpt's model: RMSNorm without parameters, no biases, no final norm, separate lm_head.
Letters: N rows of all sequences of the batch, C channels, H heads, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .activations import Activations, LayerActivations
from .data.batch import Batch
from .kv_cache import KVCache
from .params import Params, Weights
from .types import Array


class GPT:
    """The weights, and the two passes over them. Memory for a pass comes with the call."""

    def __init__(self, params: Weights) -> None:
        """Run on these weights; they are shared, not copied."""
        self.params = params
        self.dims = params.dims

    def forward(self, memory: Activations, batch: Batch) -> Array:
        """Return logits (N, V) for the batch's N tokens, and leave what backward needs."""
        ops, n_head = memory.ops, self.dims.n_head

        def attend(layer: int, s: LayerActivations) -> None:
            ops.attention(s.att, s.lse, s.qkv, batch.layout, n_head)

        return self._forward(memory, batch.tokens, batch.positions, attend)

    def loss(self, memory: Activations, batch: Batch) -> Array:
        """Return each row's cross-entropy (N,) in nats after forward; the logits stay."""
        a = memory.rows(len(batch.tokens))
        memory.ops.cross_entropy(a.losses, a.logits, batch.targets)
        return a.losses

    def prefill(self, memory: Activations, batch: Batch, cache: KVCache, sequences: Array) -> Array:
        """Forward, for rows that belong to `sequences` (N,) of the cache, which keeps them."""
        ops, n_head = memory.ops, self.dims.n_head

        def attend(layer: int, s: LayerActivations) -> None:
            keys, values = cache.keys[layer], cache.values[layer]
            ops.cache_kv(keys, values, s.qkv, sequences, batch.positions)
            ops.attention(s.att, s.lse, s.qkv, batch.layout, n_head)

        return self._forward(memory, batch.tokens, batch.positions, attend)

    def decode(self, memory: Activations, tokens: Array, cache: KVCache) -> Array:
        """Return logits (S, V) for one more token (S,) of every cached sequence, and cache it.

        The caller counts: cache.lengths stay as they are.
        """
        ops = memory.ops

        def attend(layer: int, s: LayerActivations) -> None:
            keys, values = cache.keys[layer], cache.values[layer]
            ops.cache_kv(keys, values, s.qkv, cache.sequences, cache.lengths)
            ops.attention_decode(s.att, s.qkv, keys, values, cache.lengths)

        return self._forward(memory, tokens, cache.lengths, attend)

    def _forward(
        self,
        memory: Activations,
        tokens: Array,
        positions: Array,
        attend: Callable[[int, LayerActivations], None],
    ) -> Array:
        """The equations; `attend` says what a position sees."""
        ops, a, w = memory.ops, memory.rows(len(tokens)), self.params.compute
        x = a.x0
        ops.embedding_rmsnorm(x, a.rstd0, tokens, positions, w.wte, w.wpe)
        for i, (s, layer) in enumerate(zip(a.layers, w.layers, strict=True)):
            ops.rmsnorm(s.norm1, s.rstd1, x)
            ops.linear(s.qkv, s.norm1, layer.attn_wqkv)
            attend(i, s)
            ops.linear_add(a.x_mid, s.att, layer.attn_wo, x)
            ops.rmsnorm(s.norm2, s.rstd2, a.x_mid)
            ops.linear_relu(s.hidden, s.mask, s.norm2, layer.mlp_fc1)
            ops.linear_add(a.x, s.hidden, layer.mlp_fc2, a.x_mid)
            x = a.x
        ops.linear(a.padded_logits, x, w.lm_head)
        return a.logits

    def backward(
        self, memory: Activations, batch: Batch, grads: Params, scale: Any, add: bool = False
    ) -> Array:
        """Put d(scale * sum of losses) / d(weights) into grads; return each row's loss (N,).

        With `add` it is added to what grads hold.

        Mirrors forward from its last line to its first. The logits become their gradient.
        """
        ops, a, w = memory.ops, memory.rows(len(batch.tokens)), self.params.compute
        n_head = self.dims.n_head
        ops.cross_entropy_backward(a.logits, a.losses, a.logits, batch.targets, scale)
        ops.linear_backward(a.dx, grads.lm_head, a.padded_logits, a.x, w.lm_head, add)
        for s, layer, d in zip(a.layers[::-1], w.layers[::-1], grads.layers[::-1], strict=True):
            ops.relu_linear_backward(
                a.dhidden, d.mlp_fc2, a.dx, s.hidden, s.mask, layer.mlp_fc2, add
            )
            ops.linear_backward(a.dbranch, d.mlp_fc1, a.dhidden, s.norm2, layer.mlp_fc1, add)
            ops.rmsnorm_backward_add(a.dx, a.dbranch, s.norm2, s.rstd2)
            ops.linear_backward(a.dbranch, d.attn_wo, a.dx, s.att, layer.attn_wo, add)
            ops.attention_backward(a.dqkv, a.dbranch, s.att, s.lse, s.qkv, batch.layout, n_head)
            ops.linear_backward(a.dbranch, d.attn_wqkv, a.dqkv, s.norm1, layer.attn_wqkv, add)
            ops.rmsnorm_backward_add(a.dx, a.dbranch, s.norm1, s.rstd1)
        ops.rmsnorm_backward(a.dx, a.dx, a.x0, a.rstd0)
        ids = (batch.tokens, batch.positions)
        ops.embedding_backward(grads.wte, grads.wpe, a.dx, *ids, add)
        return a.losses
