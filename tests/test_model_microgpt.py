"""The model against one written independently: microgpt's, a position at a time, lists of keys and
values, no batch. Its gradient is taken without a backward pass, by a complex step (Squire & Trapp
1998): d loss / d w = Im loss(w + ih) / h, which rounds like the loss itself however small h is.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from gpu_microgpt.activations import Activations
from gpu_microgpt.data.batch import pack
from gpu_microgpt.dims import Dims
from tests.model_cases import losses_and_grads, make_model

Weights = dict[str, np.ndarray]
H_STEP = 1e-40

CASES = {
    "names": (Dims(1, 2, 4, 4, 5), [[4, 0, 1, 4], [4, 2, 4], [4, 3, 3, 1, 4]]),
    "two layers, three heads": (Dims(2, 3, 6, 3, 3), [[2, 0, 1, 2], [2, 2]]),
}


def rmsnorm(x: np.ndarray) -> np.ndarray:
    return x * (np.mean(x * x) + 1e-5) ** -0.5


def softmax(x: np.ndarray) -> np.ndarray:
    exps = np.exp(x - x.real.max())
    return exps / exps.sum()


def position_logits(w: Weights, dims: Dims, token: int, position: int, cache: list) -> np.ndarray:
    """Logits after one more token; `cache` holds a list of keys and one of values a layer."""
    x = rmsnorm(w["wte"][token] + w["wpe"][position])
    for i, (keys, values) in enumerate(cache):
        y = rmsnorm(x)
        query, key, value = (w[f"layer{i}.attn_{name}"] @ y for name in ("wq", "wk", "wv"))
        keys.append(key)
        values.append(value)
        heads = []
        for h in range(dims.n_head):
            part = slice(h * dims.head_dim, (h + 1) * dims.head_dim)
            scores = [query[part] @ k[part] / dims.head_dim**0.5 for k in keys]
            weights = softmax(np.array(scores))
            heads.append(sum(p * v[part] for p, v in zip(weights, values, strict=True)))
        x = x + w[f"layer{i}.attn_wo"] @ np.concatenate(heads)
        hidden = w[f"layer{i}.mlp_fc1"] @ rmsnorm(x)
        x = x + w[f"layer{i}.mlp_fc2"] @ np.where(hidden.real > 0, hidden, 0)
    return w["lm_head"] @ x


def document_losses(w: Weights, dims: Dims, document: list[int]) -> list[complex]:
    cache: list = [([], []) for _ in range(dims.n_layer)]
    losses = []
    for position, (token, target) in enumerate(pairwise(document)):
        p = softmax(position_logits(w, dims, token, position, cache))
        losses.append(-np.log(p[target]))
    return losses


def mean_loss(w: Weights, dims: Dims, documents: list[list[int]]) -> complex:
    losses = [loss for document in documents for loss in document_losses(w, dims, document)]
    return sum(losses) / len(losses)


def slow_gradients(w: Weights, dims: Dims, documents: list[list[int]]) -> Weights:
    gradients = {name: np.zeros(x.shape) for name, x in w.items()}
    moved = {name: x.astype(complex) for name, x in w.items()}
    for name, x in moved.items():
        for index in np.ndindex(*x.shape):
            value = x[index]
            x[index] = value + 1j * H_STEP
            gradients[name][index] = mean_loss(moved, dims, documents).imag / H_STEP
            x[index] = value
    return gradients


@pytest.mark.parametrize("case", CASES)
def test_losses_and_every_gradient_are_microgpts(case):
    dims, documents = CASES[case]
    backend, model = make_model(dims)
    batch = pack([np.array(document) for document in documents])
    (losses,), grads = losses_and_grads(model, backend, [batch])

    weights = model.params.named
    expected = [x for d in sorted(documents, key=len) for x in document_losses(weights, dims, d)]
    assert losses == pytest.approx(np.array(expected), rel=1e-13)
    for name, slow in slow_gradients(weights, dims, documents).items():
        assert np.abs(grads.named[name] - slow).max() < 1e-14 + 1e-12 * np.abs(slow).max(), name
        assert slow.any()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_microgpts_in_float32_too(case):
    dims, documents = CASES[case]
    for dtype, tolerance in (("fp32", 1e-5), ("fp64", 1e-13)):
        backend, model = make_model(dims, dtype)
        batch = pack([np.array(document) for document in sorted(documents, key=len)])
        memory = Activations(dims, len(batch.tokens), backend, training=False)
        logits = model.forward(memory, batch)
        row = 0
        for document in sorted(documents, key=len):
            cache: list = [([], []) for _ in range(dims.n_layer)]
            for position, token in enumerate(document[:-1]):
                expected = position_logits(model.params.named, dims, token, position, cache)
                assert np.abs(logits[row] - expected).max() < tolerance
                row += 1
        assert row == len(logits)
