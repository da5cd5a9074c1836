"""The whole model with products in bfloat16 beside float32, and runs that train in it."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.backend import choose
from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.config import Config
from gpu_microgpt.dims import Dims
from gpu_microgpt.evaluate import evaluate
from gpu_microgpt.model import GPT
from gpu_microgpt.params import Weights
from gpu_microgpt.text_model import load
from tests.bf16_cases import every_unit, needs_bf16
from tests.model_cases import losses_and_grads, make_batch
from tests.run_helpers import QUIET, assert_same_run, rows, train

WHOLE, ODD = Dims(2, 3, 48, 40, 27), Dims(2, 2, 48, 40, 27)  # heads of 16 channels, of 24
LENGTHS = ([40, 1, 33, 17], [5, 9])
BF16 = ("dtype=bf16", "kernels=compiled")
pytestmark = needs_bf16


def computed(dims: Dims, dtype: str):
    """Losses and named gradients of two ragged micro-batches, the same weights in either dtype."""
    backend = NumpyBackend(dtype, 1, kernels="compiled")
    model = GPT(Weights(dims, backend))
    draw = np.random.default_rng(3)
    weights = {n: draw.normal(0, 0.08, w.shape) for n, w in model.params.named.items()}
    model.params.load({n: w.astype(backend.dtype) for n, w in weights.items()}, backend)
    batches = [make_batch(lengths, dims.vocab_size) for lengths in LENGTHS]
    losses, grads = losses_and_grads(model, backend, batches)
    return np.concatenate(losses), {n: np.array(g) for n, g in grads.named.items()}


@every_unit
@pytest.mark.parametrize("dims", [WHOLE, ODD])
def test_losses_and_gradients_are_within_its_error(unit, dims, monkeypatch):
    """Of the norm, against float64: eight bits of operands, through two layers and back."""
    monkeypatch.setattr("gpu_microgpt.ops.cpu.bf16_unit", lambda: unit)
    losses, grads = computed(dims, "bf16")
    wanted_losses, wanted = computed(dims, "fp64")
    off = np.abs(losses - wanted_losses).max()
    assert 1e-5 < off < 0.03  # above: it did round
    for name, gradient in wanted.items():
        error = np.linalg.norm(grads[name] - gradient) / np.linalg.norm(gradient)
        assert 1e-4 < error < 0.06, name  # signs of the relu that flip have most of it


def mean_loss(run) -> float:
    """Of the last fifth of a run."""
    losses = [row["loss/train"] for row in rows(run) if "loss/train" in row]
    return float(np.mean(losses[-len(losses) // 5 :]))


LEARNS = (*QUIET, "train.log_interval=1", "sample.num=0", "train.steps=150", "model.n_embd=32")


def test_it_learns_what_float32_learns(tmp_path):
    mine = mean_loss(train(tmp_path, *LEARNS, *BF16, "run.name=bf16"))
    theirs = mean_loss(train(tmp_path, *LEARNS, "dtype=fp32", "run.name=fp32"))
    first = rows(tmp_path / "runs" / "bf16")[0]["loss/train"]
    assert theirs < first - 0.4
    assert abs(mine - theirs) < 0.02


@pytest.mark.parametrize("threads", [1, 2])
def test_a_resumed_run_has_the_same_bits(threads, tmp_path):
    every = (*BF16, f"threads={threads}", "checkpoint.interval=4")
    whole = train(tmp_path, *every, "run.name=whole")
    part = train(tmp_path, *every, "run.name=part", "train.stop_at=4")
    train(tmp_path, *every, "run.name=part", "resume=auto")
    assert_same_run(part, whole, 12)


@pytest.mark.parametrize(("first", "second"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_run_goes_on_in_the_other(first, second, tmp_path):
    args = (*QUIET, "kernels=compiled", "train.log_interval=1", "sample.num=0")
    whole = train(tmp_path, *args, "dtype=fp32", "run.name=whole")
    part = train(tmp_path, *args, f"dtype={first}", "run.name=part", "train.stop_at=5")
    train(tmp_path, *args, f"dtype={second}", "run.name=part", "resume=auto")
    losses = [[row["loss/train"] for row in rows(run) if "loss/train" in row]
              for run in (part, whole)]  # fmt: skip
    assert np.abs(np.subtract(*losses)).max() < 0.01


def test_it_evaluates_and_writes(tmp_path):
    run = train(tmp_path, *BF16)
    texts = [load(run, dtype=dtype).generate(max_tokens=5) for dtype in ("bf16", "fp32")]
    assert all(texts)
    found = [evaluate(run, dtype=dtype) for dtype in ("bf16", "fp32")]
    assert 0 < abs(found[0]["loss"] - found[1]["loss"]) < 0.01


def test_a_config_asks_for_it():
    assert "bfloat16 products" in choose(Config.load("names", ["backend=numpy", *BF16])).describe()
