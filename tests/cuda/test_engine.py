"""Whole runs with backend=cupy, on the stand-in and on a GPU where there is one: the reference's
losses, the same bits when resumed, and what one backend wrote the other reads."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gpu_microgpt import cli
from gpu_microgpt.backend import choose
from gpu_microgpt.backend.cuda import CudaBackend
from gpu_microgpt.checkpoint import load
from gpu_microgpt.config import Config
from gpu_microgpt.errors import BackendError
from gpu_microgpt.ops.cuda.device import KNOWN
from gpu_microgpt.report import Report
from gpu_microgpt.text_model import load as load_model
from tests.cuda.engine_cases import CUPY, EVERY_STEP, RoundingBackend, losses
from tests.cuda.machine import bf16
from tests.cuda.stand_in import install
from tests.run_helpers import (
    QUIET,
    assert_same_run,
    checkpoint,
    no_warning,
    rows,
    saved,
    train,
    write_text,
)

# what changes the step: how batches are drawn, accumulated and cut, and the update's settings
KINDS: dict[str, tuple[str, ...]] = {
    "documents": (),
    "documents, accumulated": ("train.grad_accum=3", "train.batch_size=3"),
    "windows": ("data.mode=stream", "optimizer.grad_clip=0.5"),
    "random windows": ("data.mode=stream", "data.order=random", "train.grad_accum=2"),
    "adamw, linear": ("optimizer.name=adamw", "optimizer.weight_decay=0.1", "schedule.name=linear"),
    "one row": ("model.block_size=1", "train.batch_size=1"),
    "wide heads": ("model.n_embd=32", "model.n_head=1", "model.n_layer=1"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_losses_are_the_references(kind, place, tmp_path):
    steps = "train.steps=20"
    plain = losses(train(tmp_path, "backend=numpy", *EVERY_STEP, steps, *KINDS[kind]))
    ours = losses(train(tmp_path, *CUPY, *EVERY_STEP, steps, *KINDS[kind], "run.name=gpu"))
    assert len(ours) == 20
    assert np.abs(ours - plain).max() < 1e-4


@pytest.mark.parametrize("kind", ["documents", "windows", "wide heads"])
def test_bf16_is_as_good_as_bf16_can_be(kind, place, tmp_path, monkeypatch):
    """Its error against float64 is at most twice that of a plain bf16 trainer."""
    args = (*EVERY_STEP, "train.steps=20", *KINDS[kind])
    truth = losses(train(tmp_path, "backend=numpy", "dtype=fp64", *args))
    ours = losses(train(tmp_path, "backend=cupy", "dtype=bf16", *args, "run.name=gpu"))
    monkeypatch.setattr("gpu_microgpt.trainer.choose", lambda config: RoundingBackend())
    plain = losses(train(tmp_path, *args, "run.name=plain"))
    error, allowed = (np.sqrt(((x - truth) ** 2).mean()) for x in (ours, plain))
    assert 0 < error < 2 * allowed < 0.02


def test_a_resumed_run_has_the_same_bits(place, tmp_path):
    every = (*CUPY, "sample.temperature=0", "checkpoint.interval=4")
    whole = train(tmp_path, *every, "run.name=whole")
    part = train(tmp_path, *every, "run.name=part", "train.stop_at=4")
    assert saved(part) == [4]
    train(tmp_path, *every, "run.name=part", "resume=auto")
    assert_same_run(part, whole, 12)


@pytest.mark.parametrize("accumulated", ["train.grad_accum=1", "train.grad_accum=2"])
@pytest.mark.parametrize("order", [("cupy", "numpy"), ("numpy", "cupy")])
def test_a_run_goes_on_with_the_other_backend(order, accumulated, place, tmp_path):
    every = (*EVERY_STEP, "dtype=fp32", accumulated)
    whole = train(tmp_path, *every, "backend=numpy", "run.name=whole")
    first, second = order
    part = train(tmp_path, *every, f"backend={first}", "run.name=part", "train.stop_at=5")
    train(tmp_path, *every, f"backend={second}", "run.name=part", "resume=auto")
    assert np.abs(losses(part) - losses(whole)).max() < 1e-4
    ours, theirs = (load(checkpoint(run, 12)) for run in (part, whole))
    for name, array in theirs.weights.items():
        assert ours.weights[name].dtype == array.dtype
        assert np.abs(ours.weights[name] - array).max() < 1e-4, name


def test_a_bf16_checkpoint_holds_the_float32_weights(place, tmp_path):
    run = train(tmp_path, "backend=cupy", "dtype=bf16", *EVERY_STEP)
    weights = load(checkpoint(run, 12)).weights["lm_head"]
    assert weights.dtype == np.float32
    assert (weights != weights.astype(bf16).astype(np.float32)).mean() > 0.9


def test_everything_a_run_tells_is_the_references(place, monkeypatch, tmp_path):
    """Held-out losses, greedy samples, histograms, attention; logged at the same steps."""
    every = ("dtype=fp32", "sample.temperature=0")
    told: list[list[tuple[str, np.ndarray]]] = [[], []]

    def histograms(self: Report, step: int, arrays: dict[str, dict[str, np.ndarray]]) -> None:
        for kind, named in arrays.items():
            told[-1] += [(f"{step} {kind} {name}", array) for name, array in named.items()]

    def attention(self: Report, step: int, layer: int, qkv: np.ndarray, n_head: int) -> None:
        told[-1].append((f"{step} attention {layer} {n_head}", qkv))

    monkeypatch.setattr(Report, "histograms", histograms)
    monkeypatch.setattr(Report, "attention", attention)
    ours = train(tmp_path, "backend=cupy", *every, "run.name=cupy")
    told.reverse()
    plain = train(tmp_path, "backend=numpy", *every, "run.name=numpy")
    assert len(told[0]) == len(told[1]) == 3 * (2 * 15 + 2)
    for (name, wanted), (same, got) in zip(*told, strict=True):
        assert name == same
        assert np.abs(got - wanted).max() < 1e-4, name
    last = dict(told[0])
    for name, weights in load(checkpoint(plain, 12)).weights.items():
        assert np.abs(last[f"12 weights {name}"] - weights).max() < 1e-4
        assert np.abs(last[f"12 gradients {name}"] - weights).max() > 1e-3
    got, wanted = rows(ours), rows(plain)
    assert [(r["step"], r.keys()) for r in got] == [(r["step"], r.keys()) for r in wanted]
    for mine, theirs in zip(got, wanted, strict=True):
        for name, value in theirs.items():
            assert value is None or mine[name] == pytest.approx(value, abs=1e-4), name
    texts = [
        sorted((p.name, p.read_text()) for p in (r / "samples").iterdir()) for r in (ours, plain)
    ]
    assert texts[0] == texts[1]
    lines = (ours / "metrics.jsonl").read_text().splitlines()
    measured = set().union(*map(json.loads, lines))
    assert measured >= {"tflops", "share_of_peak", "memory_mb", "ms_per_step", "tokens_per_second"}


@pytest.mark.parametrize("limit", [0, 2])
@pytest.mark.parametrize("mode", ["documents", "stream"])
def test_evaluate_and_generate_use_the_gpu(mode, limit, place, tmp_path, capsys, monkeypatch):
    write_text(tmp_path, 200)
    run = train(
        tmp_path, "backend=numpy", *QUIET, f"data.mode={mode}", f"train.eval_batches={limit}"
    )
    (tmp_path / "short.txt").write_text("abca")  # less than a window, which is as long then
    commands = (
        ["evaluate", str(run), "--json"],
        ["evaluate", str(run), "--json", "--data", str(tmp_path / "short.txt")],
        ["generate", str(run), "--temperature", "0", "--max-tokens", "20", "--prompt", "ab"],
    )
    told: dict[str, list[str]] = {"cupy": [], "numpy": []}
    for backend in told:

        def chosen(config: Config, backend: str = backend):
            return choose(Config.from_dict(config.to_dict(), [f"backend={backend}", "dtype=fp32"]))

        monkeypatch.setattr("gpu_microgpt.text_model.choose", chosen)
        for command in commands:
            capsys.readouterr()
            assert cli.main(command) == 0
            told[backend].append(capsys.readouterr().out)
    for ours, host in zip(told["cupy"][:2], told["numpy"][:2], strict=True):
        figures, wanted = json.loads(ours), json.loads(host)
        assert figures["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
        assert figures["tokens"] == wanted["tokens"]
    assert told["cupy"][2] == told["numpy"][2]


@pytest.mark.parametrize("arch", KNOWN)
def test_runs_on_every_kind_of_gpu(arch, monkeypatch, tmp_path):
    install(monkeypatch, guarded=False, device=KNOWN[arch])
    run = train(tmp_path, "backend=cupy", *EVERY_STEP, "train.steps=3", "run.name=gpu")
    plain = train(tmp_path, "backend=numpy", *EVERY_STEP, "train.steps=3", "run.name=plain")
    assert load(checkpoint(run, 3)).meta["dtype"] == ("float32" if arch == "sm_75" else "bfloat16")
    assert np.abs(losses(run) - losses(plain)).max() < 0.01


def test_a_checkpoint_computes_where_and_how_it_is_asked_to(stand_ins, tmp_path):
    plain = train(tmp_path, "backend=numpy", "dtype=fp32", *EVERY_STEP, "train.steps=1")
    auto = train(tmp_path, "backend=numpy", *EVERY_STEP, "train.steps=1", "run.name=auto")
    asked = {
        "fp32": load_model(plain, warn=no_warning),  # as it was trained
        "bf16": load_model(auto, warn=no_warning),  # the GPU's best
        "tf32": load_model(plain, backend="cupy", dtype="tf32", warn=no_warning),
    }
    for mode, model in asked.items():
        assert isinstance(model.backend, CudaBackend)
        assert model.backend.mode == mode
    assert load_model(auto, backend="numpy", warn=no_warning).backend.name == "numpy"
    with pytest.raises(BackendError, match="tf32"):
        load_model(auto, backend="numpy", dtype="tf32", warn=no_warning)
