"""What every reference operation may use: the array module and scratch memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...arena import Shape, carve
from ...types import Array

BLOCK = 1 << 18  # elements worked on at a time: 1 MiB in float32, half of a core's L2 cache
MAX_VIEWS = 1024  # ragged batches keep coming in new shapes: forget the old ones past this many


class Context:
    """An array module and one operation's worth of scratch memory, planned beforehand."""

    def __init__(self, xp: Any, workspace: Array) -> None:
        """`workspace` is uint8; its size comes from `workspace_bytes`."""
        self.xp = xp
        self.workspace = workspace
        self._views: dict[Any, tuple[Array, ...]] = {}
        self._masks: dict[Any, Array] = {}

    def scratch(self, dtype: Any, *shapes: Shape) -> tuple[Array, ...]:
        """Uninitialised arrays side by side in the workspace, valid until the next call.

        Raises MemoryError where the plan was too small: a fault of `workspace_bytes`.
        """
        key = (dtype, shapes)
        views = self._views.get(key)
        if views is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            views = self._views[key] = carve(self.workspace, dtype, shapes)
        return views

    def blocks(self, rows: int, width: int) -> Iterator[slice]:
        """Cut rows of `width` elements into slices that fit the cache."""
        step = block_rows(rows, width)
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def causal_mask(self, size: int, dtype: Any) -> Array:
        """(keys, queries): -inf where the key comes after the query, else 0; made once."""
        key = (size, dtype)
        if key not in self._masks:
            later = self.xp.tri(size, k=-1, dtype=bool)
            self._masks[key] = self.xp.where(later, -self.xp.inf, 0).astype(dtype)
        return self._masks[key]


def block_rows(rows: int, width: int) -> int:
    """How many of `rows` rows of `width` elements make one block."""
    return max(1, min(rows, BLOCK // width))
