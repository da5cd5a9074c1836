"""Launchers of kernels/attention_tiled.cu: bfloat16, head dims 16, 32, 64, 128, from sm_80 on."""

from __future__ import annotations

import numpy as np

from ...types import Array
from .context import WARP, Context, Grid, ceil_div

ROWS = 128  # of a block
TILE = 64  # rows of keys and values, or of queries, brought to shared memory at a time
FORWARD_BLOCK = ROWS // 32 * WARP
DELTA_BLOCK = 256


def forward(ops: Context, y: Array, lse: Array, qkv: Array, offsets: Array, longest: int) -> None:
    """y (N, C) and lse (N, H) from qkv (N, 3C); no sequence has more rows than `longest`."""
    rows, n_head, head_dim = _sizes(qkv, lse)
    sequences, tiles, grid = _grid(offsets, n_head, longest)
    kernel = ops.kernel(
        "attention_tiled", "attention_tiled", forward_shared(head_dim), HEAD_DIM=head_dim
    )
    kernel(
        grid,
        (FORWARD_BLOCK,),
        (y, lse, qkv, offsets, np.int32(rows), np.int32(sequences), np.int32(n_head),
         np.int32(tiles)),
        shared_mem=forward_shared(head_dim),
    )  # fmt: skip


def backward(
    ops: Context, dqkv: Array, dy: Array, y: Array, lse: Array, qkv: Array, offsets: Array,
    longest: int,
) -> None:  # fmt: skip
    """dqkv (N, 3C); takes (N, H) float32 of scratch."""
    rows, n_head, head_dim = _sizes(qkv, lse)
    sequences, tiles, grid = _grid(offsets, n_head, longest)
    (delta,) = ops.scratch(np.float32, (rows, n_head))
    packs = rows * n_head * head_dim // ops.pack
    resident = ops.device.multiprocessors * ops.device.threads_per_multiprocessor // DELTA_BLOCK
    ops.kernel("attention_tiled", "attention_tiled_delta", HEAD_DIM=head_dim)(
        (max(1, min(ceil_div(packs, DELTA_BLOCK), resident)),),
        (DELTA_BLOCK,),
        (delta, dy, y, np.int64(packs)),
    )
    shared = backward_shared(head_dim)
    kernel = ops.kernel("attention_tiled", "attention_tiled_backward", shared, HEAD_DIM=head_dim)
    kernel(
        grid,
        (backward_block(head_dim),),
        (dqkv, dy, lse, delta, qkv, offsets, np.int32(rows), np.int32(sequences),
         np.int32(n_head), np.int32(tiles)),
        shared_mem=shared,
    )  # fmt: skip


def backward_block(head_dim: int) -> int:
    """Threads: a warp has 32 rows, of the widest heads 16."""
    return ROWS // (32 if head_dim < 128 else 16) * WARP


def forward_shared(head_dim: int) -> int:
    """Bytes of a block's queries and two tiles each of keys and values."""
    return (ROWS + 4 * TILE) * head_dim * 2


def backward_shared(head_dim: int) -> int:
    """Bytes of two tiles each of two arrays."""
    return 4 * TILE * head_dim * 2


def _sizes(qkv: Array, lse: Array) -> tuple[int, int, int]:
    """Rows, heads and head dim."""
    rows, n_head = lse.shape
    return rows, n_head, qkv.shape[1] // 3 // n_head


def _grid(offsets: Array, n_head: int, longest: int) -> tuple[int, int, Grid]:
    """Sequences, tiles of the longest, and a block a tile, head and sequence."""
    sequences, tiles = len(offsets) - 1, max(1, ceil_div(longest, ROWS))
    return sequences, tiles, (sequences * n_head * tiles,)
