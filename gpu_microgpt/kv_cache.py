"""Keys and values of the positions already read: what makes a new token cost one position."""

from __future__ import annotations

import numpy as np

from .backend import Backend
from .dims import Dims
from .types import Array

TOGETHER = 32  # texts written side by side: bounds the memory of their caches
PREFILL_ROWS = 1024  # read into a GPU's cache together at most, where one context is not longer


class KVCache:
    """Room for S sequences of up to block_size positions.

    `keys`, `values` (L, S, H, T, D); `lengths` (S,) int32: positions filled; `sequences` (S,)
    int32: their numbers, 0 to S - 1.
    """

    def __init__(self, dims: Dims, sequences: int, backend: Backend) -> None:
        """Take the memory; nothing is cached yet."""
        shape = (dims.n_layer, sequences, dims.n_head, dims.block_size, dims.head_dim)
        self.keys: Array = backend.zeros(shape, backend.dtype)
        self.values: Array = backend.zeros(shape, backend.dtype)
        self.lengths: Array = backend.zeros((sequences,), "i4")
        self.sequences: Array = backend.from_host(np.arange(sequences, dtype="i4"))


def prefill_rows(block_size: int, sequences: int) -> int:
    """Rows of the one batch in which a GPU reads contexts into its cache."""
    return max(block_size, sequences, min(sequences * block_size, PREFILL_ROWS))
