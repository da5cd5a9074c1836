"""Launchers of kernels/embedding.cu."""

from __future__ import annotations

import numpy as np

from ...arena import Shape
from ...types import Array
from .context import NULL, WARP, Context, Grid, ceil_div

BLOCK = 256
STRETCH = 1024  # entries that a warp of embedding_sort looks at
MAX_WARPS = 32
ONE_PASS = 512  # up to so many ids one pass with a block each sorts them
SLICES = 512  # of fewer entries each, where there are not as many
SHORTEST, LONGEST = 16, 64  # slices, in entries; multiples of the kernel's DEPTH
MAX_SHARED = 16384  # bytes that embedding_sum keeps ids in
PART_GROUPS = 8  # that share the parts of an id in embedding_combine


def embedding(
    self: Context, x: Array, tokens: Array, positions: Array, wte: Array, wpe: Array
) -> None:
    """Look up both tables and add."""
    rows, channels = _check_shape("embedding", "x", x)
    self.check(
        "embedding",
        x=(x, self.real, (rows, channels)),
        tokens=(tokens, "int32", (rows,)),
        positions=(positions, "int32", (rows,)),
        wte=(wte, self.real, (len(wte), channels)),
        wpe=(wpe, self.real, (len(wpe), channels)),
    )
    block = _block(channels, self.pack, rows)
    grid = max(1, ceil_div(rows, block[1]))
    arrays = (x, tokens, positions, wte, wpe)
    self.kernel("embedding", "embedding")(
        (grid,), block, (*arrays, np.int32(rows), np.int32(channels))
    )


def embedding_backward(
    self: Context, dwte: Array, dwpe: Array, dy: Array, tokens: Array, positions: Array, add: bool
) -> None:
    """Sort the rows by id; sum slices of them; put together the sums that the cuts divided."""
    rows, channels = _check_shape("embedding_backward", "dy", dy)
    vocab, block_size = len(dwte), len(dwpe)
    self.check(
        "embedding_backward",
        dwte=(dwte, "float32", (vocab, channels)),
        dwpe=(dwpe, "float32", (block_size, channels)),
        dy=(dy, self.real, (rows, channels)),
        tokens=(tokens, "int32", (rows,)),
        positions=(positions, "int32", (rows,)),
    )
    shapes = embedding_scratch(rows, channels, vocab, block_size)
    keys, order, starts, *between, parts = self.scratch(np.int32, *shapes)
    _sort(self, (keys, order, starts), tuple(between), tokens, positions, vocab, block_size)

    slice_rows = _slice_rows(rows)
    slices = ceil_div(rows, slice_rows)
    count, width, size = np.int32(rows), np.int32(channels), np.int32(slice_rows)
    tables = (dwte, dwpe, parts.view(np.float32))
    lanes, groups = _block(channels, self.pack, min(slices, MAX_SHARED // (2 * slice_rows * 4)))
    shared = groups * 2 * slice_rows * 4
    grid: Grid = (max(1, ceil_div(slices, groups)), 2)
    kernel = self.kernel("embedding", "embedding_sum", shared)
    arguments = (*tables, dy, keys, order, count, width, size, np.int32(add))
    kernel(grid, (lanes, groups), arguments, shared_mem=shared)

    resident = self.device.multiprocessors * self.device.threads_per_multiprocessor // BLOCK
    grid = (min(vocab + block_size, resident),)
    ids = (np.int32(vocab), np.int32(block_size))
    kernel = self.kernel("embedding", "embedding_combine")
    arguments = (*tables, starts, count, *ids, width, size, np.int32(add))
    kernel(grid, _block(channels, 4, PART_GROUPS), arguments)


def embedding_scratch(rows: int, channels: int, vocab: int, block_size: int) -> tuple[Shape, ...]:
    """Scratch shapes at most wanted by the backward for up to `rows` rows, 4 bytes a number: keys
    and rows in order, starts, keys and rows between two passes, parts."""
    pairs = ((2, rows), (2, rows))
    starts = (vocab + 1 + block_size + 1,)
    slices = min(ceil_div(rows, SHORTEST), max(SLICES, ceil_div(rows, LONGEST)))
    between = pairs if max(vocab, block_size) > ONE_PASS else ()
    return (*pairs, starts, *between, (2, slices, 2, channels))


def _sort(
    self: Context, out: tuple[Array, ...], between: tuple[Array, ...], tokens: Array,
    positions: Array, vocab: int, block_size: int,
) -> None:  # fmt: skip
    """(keys, rows) by (id, row), and where each id starts, in one pass or in two."""
    rows = len(tokens)
    kernel = self.kernel("embedding", "embedding_sort")
    block = (WARP * max(1, min(ceil_div(rows, STRETCH), MAX_WARPS)),)
    largest = max(vocab, block_size) - 1
    sizes = (np.int32(rows), np.int32(vocab), np.int32(block_size))
    ids: tuple[Array, ...] = (tokens, positions, NULL)
    bits = 0
    if between:
        bits = ceil_div(largest.bit_length(), 2)
        low, mask = 1 << bits, (1 << bits) - 1
        digit = (np.int32(0), np.int32(mask))
        kernel((low, 2), block, (*between, NULL, *ids, *sizes, *digit))
        keys, order = between
        ids = (keys[0], keys[1], order)
    digit = (np.int32(bits), np.int32(2**31 - 1))
    kernel(((largest >> bits) + 1, 2), block, (*out, *ids, *sizes, *digit))


def _slice_rows(rows: int) -> int:
    """Entries of a slice: few rows are cut small, to be spread over the GPU; never by the GPU's
    size, so that sums are the same on every one."""
    slice_rows = SHORTEST
    while slice_rows < LONGEST and ceil_div(rows, slice_rows) > SLICES:
        slice_rows *= 2
    return slice_rows


def _block(channels: int, pack: int, groups: int) -> tuple[int, int]:
    """Threads for a row, a pack each, and groups of them, of which `groups` have work."""
    packs = channels // pack if channels % pack == 0 else channels
    lanes = min(packs, BLOCK)
    return lanes, max(1, min(BLOCK // lanes, groups))


def _check_shape(op: str, name: str, array: Array) -> Shape:
    if array.ndim != 2 or array.shape[1] < 1:
        raise ValueError(f"{op}: {name}: got {array.shape}, wanted rows of channels")
    rows, channels = array.shape
    return rows, channels
