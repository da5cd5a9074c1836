"""Whole runs with backend=cupy, on the stand-in and on a GPU where there is one: the reference's
losses, the same bits when resumed or replayed, and nothing asked of the host in between."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_microgpt import cli
from gpu_microgpt.backend import choose
from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.checkpoint import load
from gpu_microgpt.config import Config
from gpu_microgpt.data.corpus import load_corpus
from gpu_microgpt.data.dataset import Dataset
from gpu_microgpt.dims import Dims
from gpu_microgpt.errors import BackendError, DeviceError
from gpu_microgpt.graph_step import GraphStep
from gpu_microgpt.model import GPT
from gpu_microgpt.ops.cuda.device import KNOWN
from gpu_microgpt.params import Weights, initial_weights
from gpu_microgpt.rng import Stream, normal
from gpu_microgpt.trainer import Trainer
from tests.cuda.machine import bf16, gpu_is_there
from tests.cuda.stand_in import StandInGpu, install
from tests.run_helpers import (
    QUIET,
    assert_same_run,
    checkpoint,
    no_warning,
    rows,
    saved,
    settings,
    train,
    write_text,
)

CUPY = ("backend=cupy", "dtype=fp32")
EVERY_STEP = (*QUIET, "train.log_interval=1", "sample.num=0", "checkpoint.interval=0")
PLACES = ["stand-in", *(["gpu"] if gpu_is_there() else [])]
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


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stand-in":
        install(monkeypatch, guarded=False)
    return str(request.param)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[StandInGpu]:
    return install(monkeypatch, guarded=False)


def losses(run: Path) -> np.ndarray:
    return np.array([row["loss/train"] for row in rows(run) if "loss/train" in row])


class RoundingOps:
    """The reference's operations with every result rounded to bfloat16: what a plain bf16 trainer
    computes. Weights' gradients, statistics and moments stay as they are."""

    ROUNDED = frozenset({
        "embedding_rmsnorm", "rmsnorm", "linear", "linear_add", "linear_relu", "linear_backward",
        "relu_linear_backward", "rmsnorm_backward", "rmsnorm_backward_add", "attention",
        "attention_backward", "cross_entropy_backward",
    })  # fmt: skip

    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._ops, name)

        def rounded(*args: Any) -> None:
            call(*args)
            result = args[0] if name in self.ROUNDED else args[3] if name == "adamw" else None
            if result is not None:
                result[...] = result.astype(bf16)

        return rounded


class RoundingBackend(NumpyBackend):
    """float32 that holds bfloat16 numbers; weights and sums in float64."""

    def __init__(self) -> None:
        super().__init__("fp32")
        self.master = np.dtype(np.float64)

    def workspace_bytes(self, *sizes: Any) -> int:
        return 2 * super().workspace_bytes(*sizes)

    def ops(self, workspace: Any) -> Any:
        return RoundingOps(super().ops(workspace))


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


def test_everything_a_run_tells_is_the_references(place, tmp_path):
    """Held-out losses, greedy samples, gradients' histograms; logged at the same steps."""
    every = ("dtype=fp32", "sample.temperature=0")
    ours, plain = (
        train(tmp_path, f"backend={b}", *every, f"run.name={b}") for b in ("cupy", "numpy")
    )
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
def test_evaluate_and_generate_use_the_gpu(mode, limit, place, tmp_path, capsys):
    write_text(tmp_path, 200)
    run = train(
        tmp_path, "backend=numpy", *QUIET, f"data.mode={mode}", f"train.eval_batches={limit}"
    )
    capsys.readouterr()
    figures, texts = [], []
    for backend in ("cupy", "numpy"):
        with pytest.MonkeyPatch.context() as patch:

            def chosen(config: Config, backend: str = backend):
                return choose(
                    Config.from_dict(config.to_dict(), [f"backend={backend}", "dtype=fp32"])
                )

            patch.setattr("gpu_microgpt.text_model.choose", chosen)
            assert cli.main(["evaluate", str(run), "--json"]) == 0
            figures.append(json.loads(capsys.readouterr().out))
            options = ["--temperature", "0", "--max-tokens", "20", "--prompt", "ab"]
            assert cli.main(["generate", str(run), *options]) == 0
            texts.append(capsys.readouterr().out)
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], abs=1e-5)
    assert figures[0]["tokens"] == figures[1]["tokens"]
    assert texts[0] == texts[1]


def engine_of(folder: Path, *overrides: str) -> GraphStep:
    """A step on its own, outside a trainer."""
    config = settings(folder, *EVERY_STEP, "backend=cupy", *overrides)
    dataset = Dataset.build(config, load_corpus(config.data, log=no_warning), log=lambda line: None)
    dims = Dims.of(config.model, dataset.tokenizer.vocab_size)
    backend = choose(config)
    weights = Weights(dims, backend)
    draws = 0.1 * normal(0, Stream.INIT, dims.num_params)
    weights.load(initial_weights(dims, draws, False), backend)
    return GraphStep(GPT(weights), config, backend, dataset.train, 100)


def everything(engine: GraphStep) -> list[bytes]:
    o = engine.optimizer
    params = [o.params, o.m, o.v, engine.grads, o.params.compute]
    return [engine.backend.to_host(p.flat).tobytes() for p in params]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_replays_have_the_bits_of_eager_steps(accumulated, dtype, place, tmp_path):
    args = (f"dtype={dtype}", f"train.grad_accum={accumulated}")
    replayed, eager = (engine_of(tmp_path, *args) for _ in range(2))
    with replayed.backend, eager.backend:
        for step in range(1, 6):
            replayed.train(step)
            if step == 1:
                eager.train(1)
                continue
            for micro in range(accumulated):  # what the graphs are captured from
                eager._micro_batch(add=micro > 0)
            eager._update()
        assert everything(replayed) == everything(eager)
        records = [e.ask().records()[:5] for e in (replayed, eager)]
        assert records[0].tobytes() == records[1].tobytes()


@pytest.mark.parametrize("accumulated", [1, 3])
def test_steps_are_replays_and_nothing_else(accumulated, stand_ins, tmp_path):
    engine = engine_of(tmp_path, f"train.grad_accum={accumulated}")
    (gpu,) = stand_ins
    with engine.backend:
        engine.train(1)
        before = Counter(gpu.counts)
        for step in range(2, 12):
            engine.train(step)
        assert gpu.counts - before == Counter(replays=10 * (1 if accumulated == 1 else 4))
        figures = engine.ask()
        assert gpu.counts - before - Counter(replays=40) == Counter(downloads=1)
        assert figures.records().shape == (1, 3)


def test_a_step_left_out_is_refused(stand_ins, tmp_path):
    engine = engine_of(tmp_path)
    with engine.backend:
        engine.train(7)
        with pytest.raises(ValueError, match="got step 9, wanted 8"):
            engine.train(9)


def test_figures_are_read_one_interval_late_and_never_lost(monkeypatch, tmp_path):
    """Nothing has arrived when first asked for: the run tells the same all the same."""
    quiet = (*CUPY, *QUIET, "train.steps=23", "train.log_interval=4", "checkpoint.interval=9")
    stories = []
    for late in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            install(patch, guarded=False, late=late)
            stories.append(rows(train(tmp_path, *quiet, f"run.name={late}")))
    assert stories[0] == stories[1]
    logged = [row["step"] for row in stories[0] if "loss/train" in row]
    assert logged == [4, 8, 12, 16, 20, 23]


def test_evaluating_again_waits_once_and_takes_nothing(stand_ins, tmp_path):
    engine = engine_of(tmp_path)
    (gpu,) = stand_ins
    split = Dataset.build(
        settings(tmp_path), load_corpus(settings(tmp_path).data, log=no_warning), log=lambda _: None
    ).val
    assert split is not None
    with engine.backend:
        engine.train(1)
        first = engine.mean_loss(split)
        before = Counter(gpu.counts)
        assert engine.mean_loss(split) == first
        batches = len(list(split.items()))
        assert batches > 1
        taken = gpu.counts - before
        assert taken.pop("waits", 0) <= 1
        assert taken == Counter(replays=batches, copies=2 * batches, zeros=1, downloads=1)


@pytest.mark.parametrize("late", [False, True])
def test_a_lost_device_leaves_the_last_checkpoint_good(late, monkeypatch, tmp_path):
    opened = install(monkeypatch, guarded=False, late=late)
    config = settings(tmp_path, *CUPY, *QUIET)
    trainer, save = Trainer(config), Trainer._save

    def save_and_pull_the_plug(self: Trainer, step: int) -> None:
        save(self, step)
        opened[0].fail_after(3)

    monkeypatch.setattr(Trainer, "_save", save_and_pull_the_plug)
    with pytest.raises(DeviceError) as failure:
        trainer.run()
    line = str(failure.value)
    assert "is lost" in line
    assert "the checkpoint of step 5 is kept" in line
    assert "resume=auto" in line
    assert "lr=LOWER" not in line
    assert "\n" not in line
    monkeypatch.undo()
    install(monkeypatch, guarded=False)
    assert Trainer(settings(tmp_path, *CUPY, *QUIET, "resume=auto")).run() == 0
    assert 5 in saved(config.run.path)


def test_a_plan_too_large_names_the_batch_that_fits(monkeypatch, tmp_path):
    install(monkeypatch, memory_bytes=36 << 20)
    config = settings(tmp_path, *CUPY, "train.batch_size=1000", "model.block_size=64")
    with pytest.raises(BackendError, match=r"lower train.batch_size to \d+ ") as failure:
        Trainer(config).run()
    fits = int(str(failure.value).split("lower train.batch_size to ")[1].split()[0])
    assert 1 < fits < 1000
    smaller = settings(tmp_path, *CUPY, *EVERY_STEP, "model.block_size=64", "train.steps=1")
    assert Trainer(Config.from_dict(smaller.to_dict(), [f"train.batch_size={fits}"])).run() == 0


def test_memory_that_runs_out_all_the_same_is_one_line(monkeypatch, tmp_path, capsys):
    """Others may take what was free when it was planned."""
    install(monkeypatch, memory_bytes=(32 << 20) + 20_000)
    monkeypatch.setattr("gpu_microgpt.memory_plan.check", lambda *args: "memory: enough")
    (tmp_path / "run.yaml").write_text(settings(tmp_path, *CUPY).to_yaml())
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert "out of memory" in line
    assert "lower train.batch_size" in line


@pytest.mark.parametrize("arch", KNOWN)
def test_runs_on_every_kind_of_gpu(arch, monkeypatch, tmp_path):
    install(monkeypatch, guarded=False, device=KNOWN[arch])
    run = train(tmp_path, "backend=cupy", *EVERY_STEP, "train.steps=3", "run.name=gpu")
    plain = train(tmp_path, "backend=numpy", *EVERY_STEP, "train.steps=3", "run.name=plain")
    assert load(checkpoint(run, 3)).meta["dtype"] == ("float32" if arch == "sm_75" else "bfloat16")
    assert np.abs(losses(run) - losses(plain)).max() < 0.01
