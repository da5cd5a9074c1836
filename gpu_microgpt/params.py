"""The parameter table: one flat buffer, and views into it under microgpt's names."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from .backend import Backend
from .config import Config
from .dims import Dims
from .rng import Stream, normal
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

    def __init__(self, dims: Dims, backend: Backend, dtype: Any = None) -> None:
        """Take zeroed memory on the backend, of its master dtype unless another is given."""
        self.dims = dims
        vocab_rows = backend.pad_vocab(dims.vocab_size)
        places, size = layout(dims, vocab_rows)
        self.flat: Array = backend.zeros((size,), dtype or backend.master)
        self.named: dict[str, Array] = {
            name: self.flat[start : start + prod(shape)].reshape(shape)
            for name, (start, shape) in places.items()
        }
        self.wte = self.named["wte"]  # (V, C)
        self.wpe = self.named["wpe"]  # (T, C)
        start, _ = places["lm_head"]
        padded = self.flat[start : start + vocab_rows * dims.n_embd]
        self.lm_head = padded.reshape(vocab_rows, dims.n_embd)  # V rows, then zeros
        self.layers = [self._layer(f"layer{i}.", places) for i in range(dims.n_layer)]

    def _layer(self, prefix: str, places: dict[str, tuple[int, tuple[int, int]]]) -> LayerParams:
        start, (rows, columns) = places[prefix + "attn_wq"]
        wqkv = self.flat[start : start + 3 * rows * columns].reshape(3 * rows, columns)
        rest = (self.named[prefix + name] for name in ("attn_wo", "mlp_fc1", "mlp_fc2"))
        return LayerParams(wqkv, *rest)

    def load(self, arrays: dict[str, np.ndarray[Any, Any]], backend: Backend) -> None:
        """Copy named host arrays of the table's shapes into the views, rounded to their dtype."""
        for name, view in self.named.items():
            backend.upload(view, arrays[name].astype(view.dtype, copy=False))

    def to_host(self, backend: Backend, prefix: str = "") -> dict[str, np.ndarray[Any, Any]]:
        """Named host copies."""
        return {prefix + name: backend.to_host(view) for name, view in self.named.items()}


class Weights(Params):
    """The weights, and `copy`: the same in the dtype of the matrix products, where that is another
    one (else None). An update of the weights writes both."""

    def __init__(self, dims: Dims, backend: Backend) -> None:
        """Take zeroed memory on the backend."""
        super().__init__(dims, backend)
        rounded = backend.dtype != backend.master
        self.copy = Params(dims, backend, backend.dtype) if rounded else None

    @property
    def compute(self) -> Params:
        """What a model computes with: the copy, or the weights themselves."""
        return self.copy or self

    def load(self, arrays: dict[str, np.ndarray[Any, Any]], backend: Backend) -> None:
        """Copy named host arrays of the table's shapes into both."""
        super().load(arrays, backend)
        if self.copy is not None:
            self.copy.load(arrays, backend)


def layout(dims: Dims, vocab_rows: int) -> tuple[dict[str, tuple[int, tuple[int, int]]], int]:
    """Where each tensor starts in the flat buffer and its shape, and the buffer's length.

    lm_head has room for `vocab_rows` rows, of which those beyond V are a gap like others.
    """
    places, end = {}, 0
    for name, shape in table(dims):
        if not name.endswith(("attn_wk", "attn_wv")):  # these follow attn_wq without a gap
            end = -(-end // ALIGN) * ALIGN
        places[name] = (end, shape)
        end += vocab_rows * shape[1] if name == "lm_head" else prod(shape)
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


def seeded_weights(config: Config, dims: Dims) -> dict[str, np.ndarray[Any, Any]]:
    """What a run with these settings begins with."""
    draws = config.model.init_std * normal(config.seed, Stream.INIT, dims.num_params)
    return initial_weights(dims, draws, config.model.scale_residual_init)
