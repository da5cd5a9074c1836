"""Launcher of kernels/attention_short.cu: bf16 attention of sequences that fit in shared memory."""

from __future__ import annotations

import numpy as np

from ...types import Array
from .context import WARP, Context, Grid, ceil_div

LONGEST = 256  # rows of a sequence
TILE = 16  # rows of one tensor core product
MAX_GRID_Y = 65535


def fits(ops: Context, direction: str, head_dim: int, longest: int) -> bool:
    """Whether "forward" or "backward" can do sequences up to `longest` on this device."""
    shared = _shared_bytes(direction, head_dim, longest)
    return longest <= LONGEST and shared <= ops.device.shared_per_block


def forward(ops: Context, y: Array, lse: Array, qkv: Array, offsets: Array, longest: int) -> None:
    """y and lse; rows of no sequence become 0."""
    n_head, head_dim = lse.shape[1], y.shape[1] // lse.shape[1]
    shared = _shared_bytes("forward", head_dim, longest)
    kernel = ops.kernel("attention_short", "attention_short", shared, HEAD_DIM=head_dim)
    args = (y, lse, qkv, offsets, *_sizes(y, lse, offsets))
    kernel(_grid(n_head, offsets), _block(head_dim, longest), args, shared_mem=shared)


def backward(
    ops: Context, dqkv: Array, dy: Array, y: Array, lse: Array, qkv: Array, offsets: Array,
    longest: int,
) -> None:  # fmt: skip
    """dqkv; rows of no sequence become 0."""
    n_head, head_dim = lse.shape[1], y.shape[1] // lse.shape[1]
    shared = _shared_bytes("backward", head_dim, longest)
    kernel = ops.kernel("attention_short", "attention_short_backward", shared, HEAD_DIM=head_dim)
    args = (dqkv, dy, y, lse, qkv, offsets, *_sizes(y, lse, offsets))
    kernel(_grid(2 * n_head, offsets), _block(head_dim, longest), args, shared_mem=shared)


def _sizes(y: Array, lse: Array, offsets: Array) -> tuple[np.int32, np.int32, np.int32]:
    return np.int32(len(y)), np.int32(len(offsets) - 1), np.int32(lse.shape[1])


def _grid(width: int, offsets: Array) -> Grid:
    """A block a head (two of them in backward) and sequence."""
    sequences = len(offsets) - 1
    layers = ceil_div(sequences, MAX_GRID_Y)
    return width, ceil_div(sequences, layers), layers


def _rows_of_warp(head_dim: int) -> int:
    """What a warp works on at a time: two tiles where their results fit in its registers."""
    return TILE if head_dim > 64 else 2 * TILE


def _block(head_dim: int, longest: int) -> Grid:
    """A warp for two blocks of rows: an early one, which meets few, and a late one."""
    return (WARP * max(1, ceil_div(longest, 2 * _rows_of_warp(head_dim))),)


def _shared_bytes(direction: str, head_dim: int, longest: int) -> int:
    """16 rows of two arrays and what belongs to them for every tile of the longest sequence;
    backward, too, one operand of every warp."""
    bf16 = 2
    tiles = ceil_div(longest, TILE) * bf16 * (2 * TILE * head_dim + max(64, head_dim))
    warps = _block(head_dim, longest)[0] // WARP
    operands = warps * _rows_of_warp(head_dim) * head_dim * bf16
    return tiles + (operands if direction == "backward" else 0)
