"""Causal attention: which of three kernels a batch goes to.

- `attention_short`: tensor cores, one block a sequence and head, all of it in shared memory.
- `attention_tiled`: tensor cores, tiles of queries and keys, for sequences that do not fit.
- `attention_general`: float arithmetic, for float32, other head dims and GPUs without bfloat16.
"""

from __future__ import annotations

from typing import Protocol

from ...arena import Shape
from ...data.batch import Layout
from ...types import Array
from . import attention_general, attention_short, attention_tiled
from .context import Context, rows_of

MAX_HEAD_DIM = 128
TENSOR_CORE_HEAD_DIMS = (16, 32, 64, 128)


class _Path(Protocol):
    """One of the three."""

    def forward(
        self, ops: Context, y: Array, lse: Array, qkv: Array, offsets: Array, longest: int
    ) -> None: ...

    def backward(
        self, ops: Context, dqkv: Array, dy: Array, y: Array, lse: Array, qkv: Array,
        offsets: Array, longest: int,
    ) -> None: ...  # fmt: skip


def attention(self: Context, y: Array, lse: Array, qkv: Array, layout: Layout, n_head: int) -> None:
    """y = softmax(scale q k^T, causal) v, per sequence and head; rows of no sequence become 0."""
    _check(self, "attention", {"y": y}, {"qkv": qkv}, lse, layout, n_head)
    longest = layout.longest
    _path(self, "forward", qkv.shape[1] // 3 // n_head, longest).forward(
        self, y, lse, qkv, layout.offsets, longest
    )


def attention_backward(
    self: Context, dqkv: Array, dy: Array, y: Array, lse: Array, qkv: Array, layout: Layout,
    n_head: int,
) -> None:  # fmt: skip
    """dq, dk, dv through probabilities computed again from lse; rows of no sequence become 0."""
    rows = {"dqkv": dqkv, "qkv": qkv}
    _check(self, "attention_backward", {"dy": dy, "y": y}, rows, lse, layout, n_head)
    longest = layout.longest
    _path(self, "backward", qkv.shape[1] // 3 // n_head, longest).backward(
        self, dqkv, dy, y, lse, qkv, layout.offsets, longest
    )


def _path(self: Context, direction: str, head_dim: int, longest: int) -> _Path:
    """The fastest of the three that can do it."""
    bf16 = self.real == "bfloat16" and self.device.tensor_cores
    if not bf16 or head_dim not in TENSOR_CORE_HEAD_DIMS:
        return attention_general
    if attention_short.fits(self, direction, head_dim, longest):
        return attention_short
    return attention_tiled


def _check(
    self: Context, op: str, thin: dict[str, Array], packed: dict[str, Array], lse: Array,
    layout: Layout, n_head: int,
) -> None:  # fmt: skip
    """Shapes (N, C), (N, 3C), (N, H), and a head dim the kernels know."""
    rows, width = rows_of(op, "qkv", packed["qkv"])
    channels = width // 3
    head_dim = channels // n_head
    if width != 3 * n_head * head_dim or head_dim % 4 or not 4 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: qkv: got {width} numbers a row for {n_head} heads, wanted 3 x {n_head} x a "
            f"head dim that is a multiple of 4 up to {MAX_HEAD_DIM}"
        )
    sequences = len(layout.offsets) - 1
    if sequences < 1:
        raise ValueError(f"{op}: offsets: got no sequence, wanted one or more")
    self.check(
        op,
        **{name: (array, self.real, (rows, channels)) for name, array in thin.items()},
        **{name: (array, self.real, (rows, width)) for name, array in packed.items()},
        lse=(lse, "float32", (rows, n_head)),
        offsets=(layout.offsets, "int32", (sequences + 1,)),
    )


def attention_scratch(rows: int, n_head: int) -> tuple[Shape, ...]:
    """Float32 scratch at most wanted here: a number a row and head."""
    return ((rows, n_head),)
