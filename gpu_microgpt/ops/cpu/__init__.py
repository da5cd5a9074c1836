"""The operations compiled for the CPU with Numba; `vector.py` is the language they are written in.

Same names, signatures and results as `reference/`, which is the definition; float32 and float64.
With `AmxOps` and `DotOps` operands of products are rounded to bfloat16 first; all else is float32.
`SplitOps` are float32 throughout: AMX multiplies three bfloat16 parts of each number.
"""

from __future__ import annotations

from ...arena import Shape, array_bytes
from ...dims import Dims
from .adamw import adamw, clip_scale, global_norm
from .amx import AMX_UNIT, bf16_unit
from .attention import attention, attention_backward, attention_scratch
from .attention_bf16 import fits
from .attention_bf16_backward import bf16_attention_scratch
from .attention_decode import attention_decode, cache_kv, decode_scratch
from .bf16_linear import bf16_scratch
from .cross_entropy import add_losses, cross_entropy, cross_entropy_backward
from .embedding import embedding, embedding_backward
from .instructions import AMX, DOTS, FULL, SPLIT, Instructions
from .linear import (
    linear,
    linear_add,
    linear_backward,
    linear_relu,
    linear_scratch,
    relu_linear_backward,
)
from .play import play
from .relu import relu, relu_backward
from .rmsnorm import (
    add_rmsnorm,
    embedding_rmsnorm,
    rmsnorm,
    rmsnorm_backward,
    rmsnorm_backward_add,
)
from .sample import sample, sample_philox, sample_scratch
from .softmax import softmax, softmax_backward
from .split_linear import split_scratch

__all__ = [
    "AMX_UNIT",
    "AmxOps",
    "CompiledOps",
    "DotOps",
    "SplitOps",
    "bf16_unit",
    "workspace_bytes",
]


class CompiledOps(Instructions):
    """All operations as methods over one workspace."""

    unit = FULL
    linear_scratch = staticmethod(linear_scratch)
    attention_scratch = staticmethod(attention_scratch)
    _play = staticmethod(play)

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


class SplitOps(CompiledOps):
    """The same with products of float32 by AMX, where that is faster."""

    unit = SPLIT
    linear_scratch = staticmethod(split_scratch)


class Bf16Ops(CompiledOps):
    """The same with operands of products rounded to bfloat16; made as one of the following."""

    linear_scratch = staticmethod(bf16_scratch)

    def attention_unit(self, channels: int, n_head: int) -> int:
        """The same as of all products where heads are whole vectors."""
        return self.unit if fits(channels, n_head) else FULL

    @staticmethod
    def attention_scratch(channels: int, n_head: int, longest: int) -> tuple[Shape, ...]:
        """By the same rule."""
        scratch = bf16_attention_scratch if fits(channels, n_head) else attention_scratch
        return scratch(channels, n_head, longest)


class AmxOps(Bf16Ops):
    """Multiplied by AMX."""

    unit = AMX


class DotOps(Bf16Ops):
    """Multiplied by AVX512_BF16."""

    unit = DOTS


def workspace_bytes(
    dims: Dims, rows: int, itemsize: int, kind: type[CompiledOps] = CompiledOps
) -> int:
    """Scratch that the greediest operation wants, for batches of up to `rows` positions."""
    c, v, t = dims.n_embd, dims.vocab_size, dims.block_size
    return max(
        sum(array_bytes(shape, itemsize) for shape in shapes)
        for shapes in (
            kind.linear_scratch(max(4 * c, v), 4 * c, itemsize),
            kind.attention_scratch(c, dims.n_head, min(rows, t)),
            decode_scratch(t),
            sample_scratch(v),
        )
    )
