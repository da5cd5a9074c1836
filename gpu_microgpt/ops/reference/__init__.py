"""The readable truth: every operation in plain array-module code, forward above backward."""

from __future__ import annotations

from ...arena import array_bytes
from ...dims import Dims
from .adamw import adamw, adamw_scratch, clip_scale, global_norm
from .attention import attention, attention_backward, attention_scratch
from .attention_decode import attention_decode, cache_kv
from .context import Context
from .cross_entropy import (
    add_losses,
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_scratch,
)
from .embedding import embedding, embedding_backward, embedding_scratch
from .linear import linear, linear_add, linear_backward, linear_relu, relu_linear_backward
from .relu import relu, relu_backward, relu_scratch
from .rmsnorm import (
    add_rmsnorm,
    embedding_rmsnorm,
    rmsnorm,
    rmsnorm_backward,
    rmsnorm_backward_add,
    rmsnorm_scratch,
)
from .sample import sample, sample_philox
from .softmax import softmax, softmax_backward, softmax_scratch


class ReferenceOps(Context):
    """All operations as methods over one array module and one workspace."""

    embedding = embedding
    embedding_backward = embedding_backward
    rmsnorm = rmsnorm
    embedding_rmsnorm = embedding_rmsnorm
    add_rmsnorm = add_rmsnorm
    rmsnorm_backward = rmsnorm_backward
    rmsnorm_backward_add = rmsnorm_backward_add
    linear = linear
    linear_add = linear_add
    linear_backward = linear_backward
    linear_relu = linear_relu
    relu_linear_backward = relu_linear_backward
    relu = relu
    relu_backward = relu_backward
    attention = attention
    attention_backward = attention_backward
    cache_kv = cache_kv
    attention_decode = attention_decode
    softmax = softmax
    softmax_backward = softmax_backward
    cross_entropy = cross_entropy
    cross_entropy_backward = cross_entropy_backward
    add_losses = add_losses
    global_norm = global_norm
    clip_scale = clip_scale
    adamw = adamw
    sample = sample
    sample_philox = sample_philox


def workspace_bytes(dims: Dims, rows: int, itemsize: int) -> int:
    """Scratch that the greediest operation wants, for batches of up to `rows` positions."""
    c, v, t = dims.n_embd, dims.vocab_size, dims.block_size
    gaps = 64 * (3 + 4 * dims.n_layer)  # at most, between the tensors of a flat buffer
    return max(
        sum(array_bytes(shape, itemsize) for shape in shapes)
        for shapes in (
            embedding_scratch(rows, c, max(v, t)),
            rmsnorm_scratch(rows, c),
            ((max(4 * c, v), c),),  # linear: the largest weight's gradient
            relu_scratch(rows, 4 * c),
            attention_scratch(rows, c, dims.n_head, t),
            softmax_scratch(rows, v),
            cross_entropy_scratch(rows, v),
            adamw_scratch(dims.num_params + gaps),
        )
    )
