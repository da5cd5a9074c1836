"""Every operation with its shapes and formula: the contents page of `ops/`.

Outputs come first and are written in place; nothing large is allocated. Letters: N rows (positions
of all sequences, one after another; on a GPU some of no sequence may follow), C channels, H heads,
D = C / H, V tokens, F an inner width, S sequences, P parameters. Weights are (out, in).
Floating-point arrays are all of one dtype, unless said; with bfloat16 on a GPU, statistics (rstd,
lse), losses, weights' gradients, params, m and v stay float32. ids are int32. A gradient named dX
has the shape of X; `dy` is always the upstream gradient. Results overwrite, but for operations
named `_add`, and but for the gradients of weights where `add` is true: then they are added to those
of the micro-batches before.
"""

from __future__ import annotations

from typing import Any, Protocol

from ..data.batch import Layout
from ..types import Array


class Ops(Protocol):
    """One backend's operations; `reference/` is the definition all others are tested against."""

    # x = wte[tokens] + wpe[positions]
    def embedding(self, x: Array, tokens: Array, positions: Array, wte: Array, wpe: Array) -> None:
        """x (N, C); tokens, positions (N,) int32; wte (V, C); wpe (T, C)."""

    def embedding_backward(
        self, dwte: Array, dwpe: Array, dy: Array, tokens: Array, positions: Array, add: bool
    ) -> None:
        """dwte (V, C) and dwpe (T, C): sums of the rows of dy (N, C), in a fixed order."""

    # y = x rstd, rstd = 1 / sqrt(mean(x^2) + eps)
    def rmsnorm(self, y: Array, rstd: Array, x: Array) -> None:
        """y, x (N, C); rstd (N,). y may be x."""

    def embedding_rmsnorm(
        self, y: Array, rstd: Array, tokens: Array, positions: Array, wte: Array, wpe: Array
    ) -> None:
        """rmsnorm of the embedding, of which nothing else is kept: y (N, C); rstd (N,)."""

    def add_rmsnorm(self, x: Array, y: Array, rstd: Array, branch: Array, residual: Array) -> None:
        """x = residual + branch, and its rmsnorm; all (N, C) but rstd (N,).

        x may be residual or branch.
        """

    def rmsnorm_backward(self, dx: Array, dy: Array, y: Array, rstd: Array) -> None:
        """dx, dy, y (N, C); rstd (N,). dx may be dy."""

    def rmsnorm_backward_add(self, dx: Array, dy: Array, y: Array, rstd: Array) -> None:
        """The same, added to dx: the gradient that already came down the residual."""

    # y = x w^T
    def linear(self, y: Array, x: Array, w: Array) -> None:
        """y (N, F); x (N, C); w (F, C)."""

    def linear_add(self, y: Array, x: Array, w: Array, residual: Array) -> None:
        """y = residual + x w^T; residual (N, F), another array than y."""

    def linear_backward(
        self, dx: Array, dw: Array, dy: Array, x: Array, w: Array, add: bool
    ) -> None:
        """dx (N, C); dw (F, C); dy (N, F). Serves linear_add too: its residual's gradient is dy."""

    # y = max(x w^T, 0), and the backward of a linear whose input x is such a y
    def linear_relu(self, y: Array, mask: Array, x: Array, w: Array) -> None:
        """y (N, F); x (N, C); w (F, C).

        mask (N, bytes) uint8: a place for bits y > 0, for relu_linear_backward alone to read; the
        backend says how many bytes it wants, and none where it has no use for them.
        """

    def relu_linear_backward(
        self, dx: Array, dw: Array, dy: Array, x: Array, mask: Array, w: Array, add: bool
    ) -> None:
        """dx (N, C), the gradient of z where x = max(z, 0); dw (F, C); dy (N, F); w (F, C).

        mask: what linear_relu left when it computed x.
        """

    # y = max(x, 0)
    def relu(self, y: Array, x: Array) -> None:
        """y, x (N, F); y may be x."""

    def relu_backward(self, dx: Array, dy: Array, y: Array) -> None:
        """dx, dy, y (N, F); dx may be dy. Needs the output y only."""

    # y = softmax(q k^T / sqrt(D), causal) v, per sequence and head
    def attention(self, y: Array, lse: Array, qkv: Array, layout: Layout, n_head: int) -> None:
        """y (N, C); lse (N, H): log of sum(exp(scores)); qkv (N, 3C), read as (N, 3, H, D)."""

    def attention_backward(
        self, dqkv: Array, dy: Array, y: Array, lse: Array, qkv: Array, layout: Layout, n_head: int
    ) -> None:
        """dqkv (N, 3C); the probabilities are computed again from qkv and lse."""

    def cache_kv(
        self, keys: Array, values: Array, qkv: Array, sequences: Array, positions: Array
    ) -> None:
        """Keep row n's key and value at [sequences[n], :, positions[n]].

        keys, values (S, H, T, D); qkv (N, 3C); sequences, positions (N,) int32.
        """

    def attention_decode(
        self, y: Array, qkv: Array, keys: Array, values: Array, lengths: Array
    ) -> None:
        """One query a sequence over the KV cache, positions 0..lengths.

        y (S, C); qkv (S, 3C); keys, values (S, H, T, D); lengths (S,) int32: the query's position.
        """

    # y = exp(x) / sum(exp(x)) over the last axis
    def softmax(self, y: Array, x: Array) -> None:
        """y, x (N, V); y may be x."""

    def softmax_backward(self, dx: Array, dy: Array, y: Array) -> None:
        """dx, dy, y (N, V); dx may be dy."""

    # loss = log(sum(exp(logits))) - logits[target]
    def cross_entropy(self, losses: Array, logits: Array, targets: Array) -> None:
        """losses (N,), zero where the target is -1; logits (N, V); targets (N,) int32."""

    def cross_entropy_backward(
        self, dlogits: Array, losses: Array, logits: Array, targets: Array, scale: Any
    ) -> None:
        """dlogits (N, V) = scale (softmax(logits) - onehot(targets)), and the losses with it.

        dlogits may be logits. Rows with target -1 get zeros.
        """

    def add_losses(self, total: Array, losses: Array) -> None:
        """total (1,) float64 += sum of losses (N,)."""

    # the update, over flat buffers
    def global_norm(self, norm: Array, grads: Array) -> None:
        """norm (1,) = sqrt(sum(grads^2)); grads (P,)."""

    def clip_scale(self, scale: Array, norm: Array, max_norm: float) -> None:
        """scale (1,) = min(1, max_norm / norm)."""

    def adamw(
        self,
        params: Array,
        m: Array,
        v: Array,
        copy: Array | None,
        grads: Array,
        scalars: Array,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        """params, m, v, grads (P,); scalars (4,): rate, 1 - beta1^t, 1 - beta2^t, clip scale.

        copy (P,), or None: the new params in the dtype of the matrix products.
        """

    # the next token
    def sample(
        self,
        tokens: Array,
        logits: Array,
        uniforms: Array,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> None:
        """tokens (S,) int32; logits (S, V), may be overwritten; uniforms (S,) float64 in [0, 1).

        Temperature 0 takes the largest logit; top_k 0 and top_p 1 keep every token.
        """

    def sample_philox(
        self,
        tokens: Array,
        logits: Array,
        seed: int,
        numbers: Array,
        positions: Array,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> None:
        """The same, row s drawn at rng.uniform(seed, Stream.SAMPLE, positions[s], numbers[s]).

        numbers (S,) int32: of the texts; positions (S,) int32: of their next tokens.
        """
