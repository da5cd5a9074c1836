"""Shared by the tests of the model: small models, ragged batches, passes over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_microgpt.activations import Activations
from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.data.batch import Batch, Layout, pack
from gpu_microgpt.dims import Dims
from gpu_microgpt.model import GPT
from gpu_microgpt.params import Params, Weights, table

# sizes L H C T V and the lengths of the sequences of one or several micro-batches
CASES = {
    "one position": (Dims(1, 1, 4, 1, 3), [[1]]),
    "one sequence, V 3": (Dims(1, 2, 4, 6, 3), [[6]]),
    "odd heads": (Dims(2, 3, 9, 7, 5), [[1, 2, 2, 5, 7]]),
    "one-character documents": (Dims(1, 2, 6, 4, 7), [[2, 2, 2]]),
    "micro-batches": (Dims(2, 3, 6, 5, 7), [[1, 5], [3], [2, 2, 4]]),
    "tile edges": (Dims(1, 3, 6, 66, 5), [[63, 64, 65, 66]]),
}


def make_model(dims: Dims, dtype: str = "fp64", std: float = 0.4) -> tuple[NumpyBackend, GPT]:
    """A model with random weights: of one value in both dtypes, but for rounding."""
    backend = NumpyBackend(dtype)
    params = Weights(dims, backend)
    draw = np.random.default_rng(dims.n_embd)
    weights = {name: draw.normal(0, std, shape) for name, shape in table(dims)}
    params.load({name: w.astype(backend.dtype) for name, w in weights.items()}, backend)
    return backend, GPT(params)


def make_batch(lengths: Sequence[int], vocab: int, seed: int = 0) -> Batch:
    """Random tokens."""
    draw = np.random.default_rng((seed, *lengths))
    return pack([draw.integers(0, vocab, length + 1) for length in lengths])


def ignoring(batch: Batch, rows: Sequence[int]) -> Batch:
    """The batch with the targets of these rows set to -1."""
    targets = batch.targets.copy()
    targets[list(rows)] = -1
    count = int((targets >= 0).sum())
    return Batch(batch.tokens, targets, batch.positions, batch.layout, count)


def sequence(tokens: Sequence[int]) -> Batch:
    """One sequence without targets."""
    row = np.array(tokens, np.int32)
    positions = np.arange(len(row), dtype=np.int32)
    return Batch(
        row, np.full(len(row), -1, np.int32), positions, Layout.of(np.array([len(row)])), 0
    )


def full_logits(model: GPT, backend: NumpyBackend, tokens: Sequence[int]) -> np.ndarray:
    """Logits (T, V) of one sequence, all at once."""
    memory = Activations(model.dims, len(tokens), backend, training=False)
    return np.array(model.forward(memory, sequence(tokens)))


def losses_and_grads(
    model: GPT, backend: NumpyBackend, batches: Sequence[Batch], memory: Activations | None = None
) -> tuple[list[np.ndarray], Params]:
    """Each micro-batch's losses, and the gradient of the mean over all their targets."""
    memory = memory or Activations(model.dims, max(len(b.tokens) for b in batches), backend)
    grads = Params(model.dims, backend)
    for view in grads.named.values():
        view.fill(np.nan)
    scale = 1 / sum(batch.num_targets for batch in batches)
    losses = []
    for i, batch in enumerate(batches):
        model.forward(memory, batch)
        losses.append(np.array(model.backward(memory, batch, grads, scale, add=i > 0)))
    return losses, grads


def poison(memory: Activations) -> None:
    """Fill the whole arena with 0xFF, which reads as NaN."""
    memory.ops.workspace.fill(0xFF)  # type: ignore[attr-defined]
    rows = memory.rows(memory.capacity)
    arrays = [x for x in vars(rows).values() if isinstance(x, np.ndarray)]
    arrays += [x for layer in rows.layers for x in vars(layer).values()]
    for x in arrays:
        x.fill(np.nan if x.dtype.kind == "f" else 0xFF)
