"""Launchers of kernels/attention_decode.cu: the KV cache, and one query a sequence over it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...arena import Shape
from ...types import Array
from .context import NULL, WARP, Context, ceil_div
from .device import Device

BLOCK = 128
MAX_HEAD_DIM = 128
HELD = 16  # channels of a key a lane holds at most
AHEAD_BYTES, MAX_AHEAD = 128, 8  # of keys, and keys, a lane asks for at once
STEPS = 2  # a split is worth its merge from so many steps of a block on


@dataclass(frozen=True)
class Plan:
    """How the keys of a sequence and head are shared out."""

    block: int
    splits: int


def cache_kv(
    self: Context, keys: Array, values: Array, qkv: Array, sequences: Array, positions: Array
) -> None:
    """keys[s, :, t] = k, values[s, :, t] = v for each row's sequence s and position t.

    A row with a negative sequence is not kept.
    """
    rows = len(qkv)
    _, heads, size, head_dim = _check(self, "cache_kv", keys, values, qkv, rows)
    self.check("cache_kv", sequences=(sequences, "int32", (rows,)))
    self.check("cache_kv", positions=(positions, "int32", (rows,)))
    columns = min(BLOCK, ceil_div(heads * head_dim // 2, WARP) * WARP)  # a thread four numbers
    resident = self.device.multiprocessors * self.device.threads_per_multiprocessor // BLOCK
    grid = max(1, min(ceil_div(rows, BLOCK // columns), resident))
    kernel = self.kernel("attention_decode", "cache_kv", HEAD_DIM=head_dim)
    sizes = map(np.int32, (rows, heads, size))
    block = (columns, BLOCK // columns)
    kernel((grid,), block, (keys, values, qkv, sequences, positions, *sizes))


def attention_decode(
    self: Context, y: Array, qkv: Array, keys: Array, values: Array, lengths: Array
) -> None:
    """y = softmax(q k^T / sqrt(D)) v over each sequence's positions 0..lengths.

    A negative length gives y = 0. Takes `attention_decode_scratch` of float32.
    """
    sequences = len(qkv)
    shape = _check(self, "attention_decode", keys, values, qkv, sequences)
    _, heads, size, head_dim = shape
    self.check("attention_decode", y=(y, self.real, (sequences, heads * head_dim)))
    self.check("attention_decode", lengths=(lengths, "int32", (sequences,)))
    if keys.shape[0] != sequences:
        raise ValueError(
            f"attention_decode: keys: got {keys.shape[0]} sequences, wanted {sequences}"
        )
    itemsize = keys.dtype.itemsize
    plan = cut(self.device, sequences * heads, size, head_dim, itemsize)
    constants = {"HEAD_DIM": head_dim}
    parts = (NULL, NULL)
    if plan.splits > 1:
        parts = self.scratch(np.float32, *attention_decode_scratch(self.device, shape, itemsize))
    kernel = self.kernel("attention_decode", "attention_decode", **constants)
    args = (y, *parts, qkv, keys, values, lengths, np.int32(heads), np.int32(size))
    kernel((sequences * heads, plan.splits), (plan.block,), args)
    if plan.splits > 1:
        merge = self.kernel("attention_decode", "attention_decode_merge", **constants)
        sizes = (np.int32(y.size), np.int32(plan.splits))
        merge((ceil_div(y.size, BLOCK),), (BLOCK,), (y, *parts, *sizes))


def attention_decode_scratch(device: Device, cache: Shape, itemsize: int) -> tuple[Shape, ...]:
    """Shapes of float32 scratch for keys of the shape `cache`: sums, largest scores and totals."""
    sequences, heads, size, head_dim = cache
    pairs = sequences * heads
    splits = cut(device, pairs, size, head_dim, itemsize).splits
    return ((pairs, splits, head_dim), (pairs, splits, 2)) if splits > 1 else ()


def cut(device: Device, pairs: int, size: int, head_dim: int, itemsize: int) -> Plan:
    """The plan for `pairs` sequences and heads and a cache of `size` positions.

    Keys are split over several blocks where sequences and heads leave multiprocessors idle; what
    of the cache is filled the host does not know.
    """
    lanes = 1 << max(0, ceil_div(head_dim, HELD) - 1).bit_length()  # of a key
    ahead = min(MAX_AHEAD, AHEAD_BYTES * lanes // (head_dim * itemsize))
    block = min(BLOCK, WARP * ceil_div(size, WARP // lanes * ahead))
    most = size // (block // lanes * ahead * STEPS)
    wanted = ceil_div(2 * device.multiprocessors, pairs) if pairs < device.multiprocessors else 1
    return Plan(block, max(1, min(wanted, most)))


def _check(
    self: Context, op: str, keys: Array, values: Array, qkv: Array, rows: int
) -> tuple[int, int, int, int]:
    """The cache's shape (S, H, T, D)."""
    if keys.ndim != 4 or keys.shape[3] % 4 or not 4 <= keys.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: keys: got shape {keys.shape}, wanted (S, H, T, D) with D a multiple of 4 up to "
            f"{MAX_HEAD_DIM}"
        )
    sequences, heads, size, head_dim = keys.shape
    if not sequences:
        raise ValueError(f"{op}: keys: got no sequence, wanted one or more")
    self.check(
        op,
        keys=(keys, self.real, keys.shape),
        values=(values, self.real, keys.shape),
        qkv=(qkv, self.real, (rows, 3 * heads * head_dim)),
    )
    return sequences, heads, size, head_dim
