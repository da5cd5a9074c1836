"""A step, its figures and evaluation by graphs: the bits of eager steps, the host's numbers, and
nothing asked of the host in between."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from gpu_microgpt.graph_step import GraphStep
from gpu_microgpt.trainer import Trainer
from tests.cuda.engine_cases import CUPY, dataset_of, engine_of, host_engine_of
from tests.cuda.stand_in import install
from tests.run_helpers import QUIET, rows, settings, train, write_text


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


def test_figures_are_read_one_interval_late_and_never_lost(tmp_path):
    """Nothing has arrived when first asked for: the run tells the same all the same, and does not
    wait for it from step to step."""
    quiet = (*CUPY, *QUIET, "train.steps=23", "train.log_interval=4", "checkpoint.interval=9")
    stories, train_step = [], GraphStep.train
    for late in (False, True):
        waits: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            opened = install(patch, guarded=False, late=late)

            def counted(self: GraphStep, *args: int, waits=waits, opened=opened) -> None:
                train_step(self, *args)
                waits.append(opened[0].counts["waits"])

            patch.setattr(GraphStep, "train", counted)
            stories.append(rows(train(tmp_path, *quiet, f"run.name={late}")))
        first = waits[:9]  # no checkpoint yet
        assert len(set(first)) == 1
    assert stories[0] == stories[1]
    logged = [row["step"] for row in stories[0] if "loss/train" in row]
    assert logged == [4, 8, 12, 16, 20, 23]


def test_evaluating_again_waits_once_and_takes_nothing(stand_ins, tmp_path):
    engine = engine_of(tmp_path)
    (gpu,) = stand_ins
    split = dataset_of(settings(tmp_path)).val
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


@pytest.mark.parametrize("count", [70, 90, 115])
@pytest.mark.parametrize("mode", ["documents", "stream"])
def test_held_out_losses_are_the_hosts(mode, count, place, tmp_path):
    """Of all batches, the last with fewer sequences; of two batches; of another text."""
    write_text(tmp_path, count)
    args = ("dtype=fp32", f"data.mode={mode}", "data.val_fraction=0.2")
    ours, host = engine_of(tmp_path, *args), host_engine_of(tmp_path, *args)
    dataset = dataset_of(settings(tmp_path, *args))
    assert dataset.val is not None
    assert len(dataset.val.starts) % 4
    with ours.backend, host.backend:
        for split, limit in ((dataset.val, 0), (dataset.val, 2), (dataset.train, 2)):
            wanted = host.mean_loss(split, limit)
            assert ours.mean_loss(split, limit) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_gradients_are_those_of_the_mean_loss(accumulated, place, tmp_path):
    args = ("dtype=fp32", f"train.grad_accum={accumulated}", "train.log_interval=3")
    ours, host = engine_of(tmp_path, *args), host_engine_of(tmp_path, *args)
    with ours.backend, host.backend:
        with pytest.raises(ValueError, match="wanted after a step"):
            ours.gradients()
        for step in range(1, 6):
            ours.train(step)
            host.train(step)
            wanted = host.gradients()
            for name, array in ours.gradients().items():
                limit = 1e-4 * np.abs(wanted[name]).max()
                assert np.abs(array - wanted[name]).max() <= limit, (step, name)


def test_the_clock_runs_from_figures_to_figures(stand_ins, tmp_path):
    """Every work takes the stand-in 1 ms; the first step, which is not a replay, is not timed."""
    engine = engine_of(tmp_path, "train.log_interval=50")
    (gpu,) = stand_ins
    split = dataset_of(settings(tmp_path)).val
    assert split is not None
    with engine.backend:
        engine.train(1)
        engine.mean_loss(split)
        assert engine.ask().ms_per_step() == 0
        (graph,) = engine._graphs
        step = len(graph.names)
        engine.train(2)
        engine.train(3)
        assert engine.ask().ms_per_step() == step
        gpu.costs = {"adamw": 11.0}
        engine.train(4)
        assert engine.ask().ms_per_step() == step + 10
        engine.pause()
        engine.mean_loss(split)
        engine.train(5)
        engine.train(6)
        assert engine.ask().ms_per_step() == step + 10


@pytest.mark.parametrize(
    "between",
    [
        ("train.eval_interval=3", "optimizer.lr=1e-30"),  # so that nothing is better, and saved
        ("train.sample_interval=3",),
        ("train.histogram_interval=3",),
        ("checkpoint.interval=1",),
    ],
    ids=lambda between: between[0],
)
def test_only_steps_are_timed(between, stand_ins, tmp_path):
    """Whatever is done between them; the first, which is not a replay, does not count either."""
    every = (*CUPY, *QUIET, "checkpoint.interval=0", "train.steps=24")
    trainer = Trainer(settings(tmp_path, *every, *between))
    assert trainer.run() == 0
    lines = (trainer.config.run.path / "metrics.jsonl").read_text().splitlines()
    logged = [row for row in map(json.loads, lines) if "loss/train" in row]
    (graph,) = trainer.engine._graphs
    assert [row["step"] for row in logged] == list(range(2, 25, 2))
    assert {row["ms_per_step"] for row in logged} == {len(graph.names)}


@pytest.mark.parametrize("backend", ["cupy", "numpy"])
def test_a_long_interval_loses_no_step(backend, stand_ins, monkeypatch, tmp_path):
    """Where there are fewer records than steps in a log interval."""
    every = (*CUPY, *QUIET, "train.log_interval=8", f"backend={backend}", "train.steps=20")
    told = []
    for records in (1024, 3):
        monkeypatch.setattr("gpu_microgpt.step.MAX_RECORDS", records)
        trainer = Trainer(settings(tmp_path, *every, f"run.name={records}"))
        assert trainer.run() == 0
        assert trainer.engine.ring == min(records, 8)
        told.append((list(trainer.report.recent), rows(trainer.config.run.path)))
    assert len(told[0][0]) == 20
    assert told[0] == told[1]


@pytest.mark.parametrize("accumulated", [1, 3])
def test_speeds_are_by_the_devices_clock(accumulated, stand_ins, tmp_path):
    """Tokens, floating-point operations and their share of the GPU's peak, memory in use."""
    args = (*CUPY, *QUIET, "data.mode=stream", f"train.grad_accum={accumulated}")
    trainer = Trainer(settings(tmp_path, *args))
    assert trainer.run() == 0
    (gpu,) = stand_ins
    lines = (trainer.config.run.path / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if "loss/train" in row][-1]
    graphs = trainer.engine._graphs
    seconds = sum(len(graph.names) for graph in graphs) / 1e3
    rows_done = accumulated * 4 * 8  # of four windows of eight
    flops = trainer.model.dims.train_flops(rows_done, 8) / seconds
    peak = gpu.device.peak_flops("fp32")
    assert peak is not None
    assert last["ms_per_step"] == pytest.approx(1e3 * seconds)
    assert last["tokens_per_second"] == pytest.approx(rows_done / seconds)
    assert last["gflops"] == pytest.approx(flops / 1e9)
    assert last["tflops"] == pytest.approx(flops / 1e12)
    assert last["share_of_peak"] == pytest.approx(flops / peak)
    free, total = gpu.memory()
    assert last["memory_mb"] == pytest.approx((total - free) / 1e6, rel=0.5)
