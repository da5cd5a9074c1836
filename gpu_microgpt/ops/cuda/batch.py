"""Launchers of kernels/batch.cu: a split of the corpus resident on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.dataset import Split
from ...types import Array
from .context import NULL, Context, ceil_div

ORDER_BLOCK = 512
GATHER_BLOCK = 256  # at most
MAX_BATCH = 4096  # sequences: 12 bits of a sorted number
MAX_LENGTH = 1 << 20
MAX_SAMPLES = 1 << 31
MAX_ROWS = 1 << 27  # rmsnorm has a warp for each, and numbers threads in 32 bits
LOW = 0xFFFFFFFF
WORD, DOUBLE = 4, 8  # bytes of an int32, of an int64, which may start at any of them


@dataclass(frozen=True)
class DeviceSplit:
    """What `Split.batch` reads, on a device, and how it chooses."""

    flat: Array  # (M,) uint16 tokens
    starts: Array | None  # (S,) int64; None: windows of block_size
    lengths: Array | None  # (S,) int32; None as well
    table: Array | None  # (S,) int32: the order of every epoch, where it is Python's own
    sources: Array  # (B,) int64 of its own: another branch of a graph may be using the workspace
    batch_size: int  # B
    block_size: int
    choices: int  # samples in an epoch, or places to draw from
    half: int  # bits of half a number of the shuffle's domain; 0: independent draws
    seed: int

    @classmethod
    def of(cls, split: Split, from_host: Callable[[np.ndarray[Any, Any]], Array]) -> DeviceSplit:
        """Copy a split to the device. Raises ValueError for what the kernels have no room for."""
        config, windows = split.config, split.windows
        batch_size, block_size = config.train.batch_size, config.model.block_size
        epochs, microgpt = config.data.order == "epochs", config.rng == "microgpt"
        choices = split.samples if epochs else split.choices
        for name, got, limit in (
            ("batch_size", batch_size, MAX_BATCH + 1),
            ("block_size", block_size, MAX_LENGTH),
            ("samples", split.samples, MAX_SAMPLES),
            ("rows", batch_size * block_size, MAX_ROWS),
        ):
            if got >= limit:
                raise ValueError(f"batch: {name}: got {got}, wanted less than {limit}")
        order = split.draw(0, split.samples).astype(np.int32) if microgpt else None
        return cls(
            from_host(split.flat),
            None if windows else from_host(split.starts),
            None if windows else from_host(split.lengths.astype(np.int32)),
            None if order is None else from_host(order),
            from_host(np.zeros(batch_size, np.int64)),
            batch_size,
            block_size,
            choices,
            max(1, ceil_div((choices - 1).bit_length(), 2)) if epochs else 0,
            config.seed,
        )

    @property
    def capacity(self) -> int:
        """Rows of the largest batch."""
        return self.batch_size * self.block_size

    def batch(
        self,
        ops: Context,
        tokens: Array,
        targets: Array,
        positions: Array,
        offsets: Array,
        count: Array,
        counter: Array,
    ) -> None:
        """The same as `Split.batch(step, micro)`, counter being step * grad_accum + micro.

        tokens, targets, positions (capacity,) int32: rows from offsets[B] on are 0, -1, 0;
        offsets (B + 1,) int32; count (1,) int32: targets; counter (1,) int64.
        """
        size = self.batch_size
        ops.check("batch", count=(count, "int32", (1,)), counter=(counter, "int64", (1,)))
        ops.check("batch", WORD, offsets=(offsets, "int32", (size + 1,)))
        shared = 8 << (size - 1).bit_length() if self.lengths is not None else 0
        order = ops.kernel("batch", "batch_order", shared)
        order((1,), (ORDER_BLOCK,), (
            self.sources, offsets, count, counter, _pointer(self.starts),
            _pointer(self.lengths), _pointer(self.table), np.int32(size), np.int32(self.block_size),
            np.int64(self.choices), np.int32(self.half), np.uint32(self.seed & LOW),
            np.uint32(self.seed >> 32),
        ), shared_mem=shared)  # fmt: skip
        self.gather(ops, tokens, targets, positions, self.sources, offsets)

    def gather(
        self,
        ops: Context,
        tokens: Array,
        targets: Array,
        positions: Array,
        sources: Array,
        offsets: Array,
    ) -> None:
        """The rows of up to B given sequences, padded as those of `batch`.

        sources (B,) int64: where in `flat` each begins; offsets (B + 1,) int32: its rows. Where
        there are fewer, the last offsets are equal: of an empty sequence nothing is read.
        """
        size = self.batch_size
        rows = {"tokens": tokens, "targets": targets, "positions": positions}
        ops.check("batch", **{k: (a, "int32", (self.capacity,)) for k, a in rows.items()})
        ops.check("batch", DOUBLE, sources=(sources, "int64", (size,)))
        ops.check("batch", WORD, offsets=(offsets, "int32", (size + 1,)))
        block = min(GATHER_BLOCK, ceil_div(self.block_size, 32) * 32)
        gather = ops.kernel("batch", "batch_gather")
        gather((size, ceil_div(self.block_size, block)), (block,), (
            tokens, targets, positions, self.flat, sources, offsets, np.int32(size),
            np.int32(self.capacity),
        ))  # fmt: skip


def _pointer(array: Array | None) -> Any:
    return NULL if array is None else array
