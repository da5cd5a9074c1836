"""Launchers of kernels/attention_general.cu: attention in float arithmetic, on any GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...types import Array
from .context import WARP, Context, Grid, ceil_div

BLOCK = 128  # threads at most
HELD = 16  # channels of a row a lane holds at most
TILE_FLOATS = 4096  # numbers in a tile of keys at most: two of them leave room for three blocks
FORWARD_ROWS, BACKWARD_ROWS = (4, 2, 1), (2, 1)  # rows a thread, the fewest reads a row first
WARPS_WANTED = 6  # a multiprocessor, before a thread takes more rows


@dataclass(frozen=True)
class Plan:
    """How a batch is cut up."""

    rows: int  # a thread
    lanes: int  # threads that share a sequence and head's tile of rows
    tile: int  # rows of keys in shared memory at once
    block: int
    grid: Grid

    @property
    def pairs(self) -> int:
        """Sequences and heads a block does at once."""
        return self.block // self.lanes


def forward(self: Context, y: Array, lse: Array, qkv: Array, offsets: Array, longest: int) -> None:
    """y (N, C), lse (N, H) from qkv (N, 3C)."""
    head_dim, plan = _plan(self, lse, qkv, offsets, longest, FORWARD_ROWS)
    shared = plan.pairs * 2 * plan.tile * padded(head_dim) * 4
    _launch(self, "attention_general", plan, shared, head_dim, (y, lse, qkv), lse, offsets)


def backward(
    self: Context, dqkv: Array, dy: Array, y: Array, lse: Array, qkv: Array, offsets: Array,
    longest: int,
) -> None:  # fmt: skip
    """dqkv (N, 3C) from dy, y (N, C), lse (N, H), qkv (N, 3C)."""
    head_dim, plan = _plan(self, lse, qkv, offsets, longest, BACKWARD_ROWS)
    shared = plan.pairs * 2 * plan.tile * (padded(head_dim) + 1) * 4
    arrays = (dqkv, dy, y, lse, qkv)
    _launch(self, "attention_general_backward", plan, shared, head_dim, arrays, lse, offsets)


def lanes_a_row(head_dim: int) -> int:
    """The fewest lanes, a power of two, that hold a row."""
    return _power_of_two(ceil_div(head_dim, HELD))


def padded(head_dim: int) -> int:
    """Numbers a row of a tile takes: as many quads in every lane."""
    share = lanes_a_row(head_dim)
    return ceil_div(head_dim // 4, share) * share * 4


def cut(self: Context, head_dim: int, pairs: int, longest: int, choices: tuple[int, ...]) -> Plan:
    """The plan for `pairs` sequences and heads of up to `longest` rows.

    A number read from shared memory serves a thread's rows: the more the better, as long as
    enough warps are left to fill the GPU.
    """
    share = lanes_a_row(head_dim)
    for rows in choices:
        length = max(_power_of_two(longest), 4)  # a tile is at least four keys
        lanes = min(BLOCK, length // rows * share)
        height = lanes // share * rows
        block = max(lanes, WARP)
        grid = (ceil_div(pairs, block // lanes), max(1, ceil_div(longest, height)))
        warps = grid[0] * grid[1] * block // WARP
        if rows == choices[-1] or warps >= WARPS_WANTED * self.device.multiprocessors:
            break
    tile = min(64, height, 1 << (TILE_FLOATS // padded(head_dim)).bit_length() - 1)
    return Plan(rows, lanes, tile, block, grid)


def _power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _plan(
    self: Context, lse: Array, qkv: Array, offsets: Array, longest: int, choices: tuple[int, ...]
) -> tuple[int, Plan]:
    heads = lse.shape[1]
    head_dim = qkv.shape[1] // 3 // heads
    return head_dim, cut(self, head_dim, (len(offsets) - 1) * heads, longest, choices)


def _launch(
    self: Context, name: str, plan: Plan, shared: int, head_dim: int, arrays: tuple[Array, ...],
    lse: Array, offsets: Array,
) -> None:  # fmt: skip
    kernel = self.kernel("attention_general", name, shared, HEAD_DIM=head_dim, ROWS=plan.rows)
    sizes = (*lse.shape[:1], len(offsets) - 1, *lse.shape[1:], plan.lanes, plan.tile)
    args = (*arrays, offsets, *map(np.int32, sizes))
    kernel(plan.grid, (plan.block,), args, shared_mem=shared)
