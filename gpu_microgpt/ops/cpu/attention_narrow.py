"""attention.py's methods with bfloat16 operands where heads are whole vectors."""

from __future__ import annotations

from ...arena import Shape
from ...data.batch import Layout
from ...types import Array
from .attention import attention as full_attention
from .attention import attention_backward as full_attention_backward
from .attention import attention_scratch as full_scratch
from .attention_bf16 import LANES
from .attention_bf16_backward import CHUNK, KEPT
from .bf16 import SIDE, STAGE
from .instructions import ATTENTION, ATTENTION_BACKWARD, Instructions


def attention(
    self: Instructions, y: Array, lse: Array, qkv: Array, layout: Layout, n_head: int
) -> None:
    """As attention.py's."""
    channels, size = y.shape[1], len(layout.offsets) - 1
    if not _fits(channels, n_head):
        full_attention(self, y, lse, qkv, layout, n_head)
        return
    (scratch,) = self.scratch(y.dtype, *_scratch(channels, n_head, layout.longest))
    sizes = (channels, n_head)
    self.do(
        ATTENTION, len(y), y, lse, qkv, layout.offsets, *sizes, scratch, self.unit, sequences=size
    )


def attention_backward(
    self: Instructions, dqkv: Array, dy: Array, y: Array, lse: Array, qkv: Array, layout: Layout,
    n_head: int,
) -> None:  # fmt: skip
    """As attention.py's; y is read."""
    channels, size = dy.shape[1], len(layout.offsets) - 1
    if not _fits(channels, n_head):
        full_attention_backward(self, dqkv, dy, y, lse, qkv, layout, n_head)
        return
    (scratch,) = self.scratch(dy.dtype, *_scratch(channels, n_head, layout.longest))
    arrays, sizes = (dqkv, dy, lse, qkv, layout.offsets), (channels, n_head)
    self.do(ATTENTION_BACKWARD, len(dy), *arrays, *sizes, scratch, self.unit, y, sequences=size)


def attention_scratch(rows: int, channels: int, n_head: int, block_size: int) -> tuple[Shape, ...]:
    """Scratch shapes at most wanted here."""
    if not _fits(channels, n_head):
        return full_scratch(rows, channels, n_head, block_size)
    return _scratch(channels, n_head, min(rows, block_size))


def _fits(channels: int, n_head: int) -> bool:
    """Whether heads are whole vectors."""
    return channels % n_head == 0 and channels // n_head % LANES == 0


def _scratch(channels: int, n_head: int, longest: int) -> tuple[Shape, ...]:
    """That of the backward pass, in its order; the forward pass needs less."""
    up, deep = (-(-n // SIDE) * SIDE for n in (longest, channels // n_head))
    kept = up * deep + deep * up // 2 + deep * CHUNK + 2 * up * KEPT
    tile = SIDE * deep + 2 * up * SIDE + up // 2 * SIDE + deep * SIDE + 2 * SIDE
    return ((STAGE + kept + tile,),)
