"""Arrays cut out of one block of bytes: the sum is known before any of it is taken."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import numpy as np

from .types import Array

ALIGN = 64  # bytes: a cache line, and the widest vector

Shape = tuple[int, ...]


def array_bytes(shape: Shape, itemsize: int) -> int:
    """Bytes one array takes in an arena: its own, rounded up to the alignment."""
    return -(-prod(shape) * itemsize // ALIGN) * ALIGN


def carve(block: Array, dtype: Any, shapes: Iterable[Shape]) -> tuple[Array, ...]:
    """Return uninitialised arrays of `dtype`, one after another in `block` (uint8).

    Raises MemoryError where the block is too small: a fault of the plan behind it.
    """
    itemsize = np.dtype(dtype).itemsize
    views, start = [], 0
    for shape in shapes:
        end = start + prod(shape) * itemsize
        if end > block.nbytes:
            raise MemoryError(f"arena: got {block.nbytes:,} bytes, wanted {end:,} for {shape}")
        views.append(block[start:end].view(dtype).reshape(shape))
        start += array_bytes(shape, itemsize)
    return tuple(views)
