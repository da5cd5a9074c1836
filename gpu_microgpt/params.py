"""The parameter table: one flat buffer, and views into it under microgpt's names."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from .backend import Backend
from .dims import Dims
from .types import Array

ALIGN = 64  # elements: every weight starts on a cache line and on a GPU memory transaction


@dataclass(frozen=True)
class LayerParams:
    """One layer's matrices, (out, in)."""

    attn_wqkv: Array  # (3C, C): attn_wq, attn_wk and attn_wv, one below the other
    attn_wo: Array  # (C, C)
    mlp_fc1: Array  # (4C, C)
    mlp_fc2: Array  # (C, 4C)


def table(dims: Dims) -> list[tuple[str, tuple[int, int]]]:
    """Names and shapes in microgpt.py's order."""
    c = dims.n_embd
    rows: list[tuple[str, tuple[int, int]]] = [
        ("wte", (dims.vocab_size, c)),
        ("wpe", (dims.block_size, c)),
        ("lm_head", (dims.vocab_size, c)),
    ]
    for layer in range(dims.n_layer):
        rows += [(f"layer{layer}.attn_{w}", (c, c)) for w in ("wq", "wk", "wv", "wo")]
        rows += [(f"layer{layer}.mlp_fc1", (4 * c, c)), (f"layer{layer}.mlp_fc2", (c, 4 * c))]
    return rows


class Params:
    """Weights, or anything shaped like them: gradients, moments.

    `flat` (P,), P the padded length, holds all of it, so that an update, a norm or a sum is one
    pass; the gaps that keep tensors aligned hold zeros and stay zero. `named` maps the table's
    names to views.
    """

    def __init__(self, dims: Dims, backend: Backend) -> None:
        """Take zeroed memory on the backend."""
        self.dims = dims
        places, size = layout(dims)
        self.flat: Array = backend.zeros((size,), backend.dtype)
        self.named: dict[str, Array] = {
            name: self.flat[start : start + prod(shape)].reshape(shape)
            for name, (start, shape) in places.items()
        }
        self.wte = self.named["wte"]  # (V, C)
        self.wpe = self.named["wpe"]  # (T, C)
        self.lm_head = self.named["lm_head"]  # (V, C)
        self.layers = [self._layer(f"layer{i}.", places) for i in range(dims.n_layer)]

    def _layer(self, prefix: str, places: dict[str, tuple[int, tuple[int, int]]]) -> LayerParams:
        start, (rows, columns) = places[prefix + "attn_wq"]
        wqkv = self.flat[start : start + 3 * rows * columns].reshape(3 * rows, columns)
        rest = (self.named[prefix + name] for name in ("attn_wo", "mlp_fc1", "mlp_fc2"))
        return LayerParams(wqkv, *rest)

    def load(self, arrays: dict[str, np.ndarray[Any, Any]], backend: Backend) -> None:
        """Copy named host arrays of the table's shapes into the views."""
        for name, view in self.named.items():
            view[...] = backend.from_host(arrays[name])

    def to_host(self, backend: Backend, prefix: str = "") -> dict[str, np.ndarray[Any, Any]]:
        """Named host copies."""
        return {prefix + name: backend.to_host(view) for name, view in self.named.items()}


def layout(dims: Dims) -> tuple[dict[str, tuple[int, tuple[int, int]]], int]:
    """Where each tensor starts in the flat buffer and its shape, and the buffer's length."""
    places, end = {}, 0
    for name, shape in table(dims):
        if not name.endswith(("attn_wk", "attn_wv")):  # these follow attn_wq without a gap
            end = -(-end // ALIGN) * ALIGN
        places[name] = (end, shape)
        end += prod(shape)
    return places, -(-end // ALIGN) * ALIGN


def initial_weights(
    dims: Dims, draws: np.ndarray[Any, Any], scale_residual: bool
) -> dict[str, np.ndarray[Any, Any]]:
    """Cut one long row of `dims.num_params` draws into named tensors, in the table's order.

    With `scale_residual` the two matrices a layer that write into the residual (attn_wo, mlp_fc2)
    are divided by sqrt(2 L), so that depth does not widen it (Radford et al. 2019).
    """
    weights, end = {}, 0
    for name, shape in table(dims):
        start, end = end, end + prod(shape)
        weights[name] = draws[start:end].reshape(shape)
        if scale_residual and name.endswith(("attn_wo", "mlp_fc2")):
            weights[name] = weights[name] / (2 * dims.n_layer) ** 0.5
    return weights
