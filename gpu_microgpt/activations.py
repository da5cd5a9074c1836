"""Every array a pass over a batch needs: one table, one piece of memory, planned beforehand."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arena import Shape, array_bytes, carve
from .backend import Backend
from .dims import Dims
from .ops import Ops
from .types import Array

MAX_VIEWS = 256  # row counts remembered: ragged batches keep coming in new ones


@dataclass(frozen=True)
class LayerActivations:
    """What a layer's forward pass leaves for its backward pass."""

    norm1: Array  # (N, C)
    rstd1: Array  # (N,)
    qkv: Array  # (N, 3C)
    att: Array  # (N, C)
    lse: Array  # (N, H)
    norm2: Array  # (N, C)
    rstd2: Array  # (N,)
    hidden: Array  # (N, 4C), after the relu
    mask: Array  # (N, bytes): where hidden is positive, for operations that want it as bits


@dataclass(frozen=True)
class Rows:
    """The arena's arrays for a batch of N rows."""

    x0: Array  # (N, C), the normalised embedding
    rstd0: Array  # (N,)
    x_mid: Array  # (N, C), the residual stream inside a layer
    x: Array  # (N, C), the residual stream between layers
    logits: Array  # (N, V); backward turns them into dlogits
    padded_logits: Array  # the same with the padding of their rows, as matrix products take them
    losses: Array  # (N,)
    layers: tuple[LayerActivations, ...]
    dx: Array  # (N, C), the residual stream's gradient
    dbranch: Array  # (N, C), gradient inside a branch
    dqkv: Array  # (N, 3C)
    dhidden: Array  # (N, 4C)


STATISTICS = ("rstd0", "rstd1", "rstd2", "lse", "losses")  # in the master dtype
BYTES = ("mask",)

Entry = tuple[str, Shape, "np.dtype[Any]", int]  # name, shape, dtype, bytes


def table(dims: Dims, rows: int, backend: Backend, training: bool) -> list[tuple[str, Shape]]:
    """Names and shapes for up to `rows` positions.

    Without training every layer shares one set of arrays and there are no gradients.
    """
    n, c, h = rows, dims.n_embd, dims.n_head
    v, bits = backend.pad_vocab(dims.vocab_size), backend.relu_mask_bytes(4 * c)
    entries: list[tuple[str, Shape]] = [
        ("x0", (n, c)), ("rstd0", (n,)), ("x_mid", (n, c)), ("x", (n, c)),
        ("padded_logits", (n, v)), ("losses", (n,)),
    ]  # fmt: skip
    for layer in range(dims.n_layer if training else 1):
        shapes = {
            "norm1": (n, c), "rstd1": (n,), "qkv": (n, 3 * c), "att": (n, c), "lse": (n, h),
            "norm2": (n, c), "rstd2": (n,), "hidden": (n, 4 * c), "mask": (n, bits),
        }  # fmt: skip
        entries += [(f"layer{layer}.{name}", shape) for name, shape in shapes.items()]
    if training:
        entries += [("dx", (n, c)), ("dbranch", (n, c)), ("dqkv", (n, 3 * c))]
        entries += [("dhidden", (n, 4 * c))]
    return entries


def plan(
    dims: Dims, rows: int, backend: Backend, training: bool, sequences: int = 0
) -> list[Entry]:
    """The table with dtypes and bytes, and the operations' workspace as last row."""
    entries: list[Entry] = []
    for name, shape in table(dims, rows, backend, training):
        kind = name.rpartition(".")[2]
        dtype = backend.master if kind in STATISTICS else backend.dtype
        dtype = np.dtype("u1") if kind in BYTES else dtype
        entries.append((name, shape, dtype, array_bytes(shape, dtype.itemsize)))
    scratch = backend.workspace_bytes(dims, rows, sequences)
    return [*entries, ("workspace", (scratch,), np.dtype("u1"), scratch)]


class Activations:
    """One arena for batches of up to `capacity` rows, and the operations that work in it."""

    def __init__(
        self,
        dims: Dims,
        capacity: int,
        backend: Backend,
        training: bool = True,
        sequences: int = 0,
    ) -> None:
        """Take the planned memory in one piece; `sequences`: of a KV cache that is decoded."""
        self.dims, self.capacity, self.training = dims, capacity, training
        self._rows: OrderedDict[int, Rows] = OrderedDict()
        *entries, (_, _, _, scratch) = plan(dims, capacity, backend, training, sequences)
        self.nbytes = scratch + sum(size for *_, size in entries)
        arena = backend.empty((self.nbytes,), "u1")
        self.ops: Ops = backend.ops(arena[:scratch])
        self._arrays: dict[str, Array] = {}
        start = scratch
        for name, shape, dtype, size in entries:
            (self._arrays[name],) = carve(arena[start : start + size], dtype, [shape])
            start += size

    def rows(self, count: int) -> Rows:
        """Views of the first `count` rows of everything. Raises ValueError beyond the capacity."""
        if count > self.capacity:
            raise ValueError(f"batch: got {count} rows, wanted at most {self.capacity}")
        rows = self._rows.get(count)
        if rows is None:
            if len(self._rows) >= MAX_VIEWS:
                self._rows.popitem(last=False)
            rows = self._rows[count] = self._cut(count)
        return rows

    def _cut(self, count: int) -> Rows:
        views: dict[str, Any] = {name: a[:count] for name, a in self._arrays.items()}
        fields = LayerActivations.__dataclass_fields__
        layers = []
        for layer in range(self.dims.n_layer):
            kept = layer if self.training else 0
            layers.append(LayerActivations(*(views[f"layer{kept}.{name}"] for name in fields)))
        plain = {name: view for name, view in views.items() if "." not in name}
        plain["logits"] = plain["padded_logits"][:, : self.dims.vocab_size]
        if not self.training:
            plain |= dict.fromkeys(("dx", "dbranch", "dqkv", "dhidden"))
        return Rows(layers=tuple(layers), **plain)
