"""Launchers of kernels/*.cu: one file a stem, with the reference operations' names."""

from __future__ import annotations

from ...arena import array_bytes
from ...dims import Dims
from .adamw import adamw, adamw_scratch, clip_scale, global_norm
from .attention import attention, attention_backward, attention_scratch
from .attention_decode import attention_decode, attention_decode_scratch, cache_kv
from .context import Context
from .cross_entropy import add_losses, cross_entropy, cross_entropy_backward
from .decode import emit, forbid
from .device import Device
from .embedding import embedding, embedding_backward, embedding_scratch
from .linear import linear, linear_add, linear_backward, linear_relu, relu_linear_backward
from .relu import relu, relu_backward
from .rmsnorm import (
    add_rmsnorm,
    embedding_rmsnorm,
    rmsnorm,
    rmsnorm_backward,
    rmsnorm_backward_add,
)
from .sample import sample, sample_philox
from .softmax import softmax, softmax_backward
from .step import advance, update_scalars


class CudaOps(Context):
    """The operations as methods over one device, one loader of kernels and one workspace.

    The matrix products are the vendor's library's; all others are kernels of `kernels/`.
    """

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
    advance = advance  # from here on not the protocol's: what only a captured graph needs
    update_scalars = update_scalars
    forbid = forbid
    emit = emit


def workspace_bytes(
    dims: Dims, rows: int, device: Device, itemsize: int, sequences: int = 0
) -> int:
    """Scratch that the greediest operation wants, for batches of up to `rows` positions.

    itemsize: bytes of a weight or activation; sequences: of a KV cache, where one is decoded.
    """
    c, h, t, d = dims.n_embd, dims.n_head, dims.block_size, dims.head_dim
    cache = (sequences, h, t, d)
    gaps = 64 * (3 + 4 * dims.n_layer)  # at most, between the tensors of a flat buffer
    float32, float64 = 4, 8
    return max(
        sum(array_bytes(shape, size) for shape in shapes)
        for size, shapes in (
            (float32, embedding_scratch(rows, c, dims.vocab_size, t)),
            (float32, attention_scratch(rows, h)),
            (float32, attention_decode_scratch(device, cache, itemsize) if sequences else ()),
            (float64, adamw_scratch(device, dims.num_params + gaps)),
        )
    )
