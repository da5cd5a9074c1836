"""The whole model with float32 multiplied by AMX beside float64 and beside plain float32."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.dims import Dims
from gpu_microgpt.model import GPT
from gpu_microgpt.params import Weights
from tests.bf16_cases import missing
from tests.model_cases import losses_and_grads, make_batch

DIMS = Dims(2, 4, 96, 64, 101)  # all products of its rows are as large as AMX gets them
LENGTHS = ([64, 1, 33, 17], [60, 40])
SAID = "float32 (products on AMX, in three bfloat16 parts), "
pytestmark = pytest.mark.skipif(bool(missing("AMX")), reason=missing("AMX") or "-")


def computed(dtype: str):
    """Losses and named gradients of two ragged micro-batches, the same weights in either dtype."""
    backend = NumpyBackend(dtype, 1, kernels="compiled")
    model = GPT(Weights(DIMS, backend))
    draw = np.random.default_rng(3)
    weights = {
        n: draw.normal(0, 0.08, w.shape).astype(np.float32).astype(backend.dtype)
        for n, w in model.params.named.items()
    }
    model.params.load(weights, backend)
    batches = [make_batch(lengths, DIMS.vocab_size) for lengths in LENGTHS]
    losses, grads = losses_and_grads(model, backend, batches)
    return np.concatenate(losses), {n: np.array(g) for n, g in grads.named.items()}


def elsewhere(monkeypatch):
    """A CPU without AMX."""
    monkeypatch.setattr("gpu_microgpt.ops.cpu.bf16_unit", lambda: "")


def test_losses_and_gradients_are_as_near_as_plain_float32(monkeypatch):
    """To float64's, by the norm: within 1.5 times, luck included."""
    wanted_losses, wanted = computed("fp64")
    losses, grads = computed("fp32")
    elsewhere(monkeypatch)
    plain_losses, plain = computed("fp32")
    assert losses.tobytes() != plain_losses.tobytes()
    errors = [np.linalg.norm(found - wanted_losses) for found in (losses, plain_losses)]
    assert errors[0] <= 1.5 * errors[1]
    for name, gradient in wanted.items():
        errors = [np.linalg.norm(found[name] - gradient) for found in (grads, plain)]
        assert errors[0] <= 1.5 * errors[1], name
        assert errors[0] < 1e-5 * np.linalg.norm(gradient), name


def test_what_computes_is_said(monkeypatch):
    assert SAID in NumpyBackend("fp32", kernels="compiled").describe()
    assert type(NumpyBackend(kernels="auto").ops(np.zeros(64, "u1"))).__name__ == "SplitOps"
    for dtype, kernels in (("fp64", "compiled"), ("fp32", "reference"), ("bf16", "compiled")):
        assert "three" not in NumpyBackend(dtype, kernels=kernels).describe()
    elsewhere(monkeypatch)
    backend = NumpyBackend("fp32", kernels="compiled")
    assert "three" not in backend.describe()
    assert type(backend.ops(np.zeros(64, "u1"))).__name__ == "CompiledOps"


def test_memory_is_planned():
    """Every size of product fits the workspace, which it may fill."""
    from gpu_microgpt.ops.cpu.split_linear import split_scratch

    backend = NumpyBackend("fp32", kernels="compiled")
    for channels, vocab in ((4, 3), (20, 1000), (128, 66)):
        planned = backend.workspace_bytes(Dims(1, 1, channels, 8, vocab), 50)
        for outputs, inputs in (
            (3 * channels, channels), (4 * channels, channels), (channels, 4 * channels),
            (vocab, channels),
        ):  # fmt: skip
            sizes = [4 * shape[0] for shape in split_scratch(outputs, inputs, 4)]
            assert sum(-(-size // 64) * 64 for size in sizes) <= planned
