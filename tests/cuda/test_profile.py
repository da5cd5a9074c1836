"""profile=true on the GPU's backend: a table of the kernels of a step, as many as are in its graph,
timed by events in steps that are done eagerly; a run that is otherwise the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpu_microgpt.backend import Backend, choose
from gpu_microgpt.backend.cuda import NARROW
from gpu_microgpt.checkpoint import load
from gpu_microgpt.config import Config
from gpu_microgpt.dims import Dims
from gpu_microgpt.ops.cuda.linear import relu_mask_bytes
from gpu_microgpt.profile import PROFILED_STEPS, make_profiler
from gpu_microgpt.trainer import Trainer
from tests.cuda.engine_cases import engine_of
from tests.cuda.stand_in import StandInGpu, install
from tests.run_helpers import (
    MEASURED,
    assert_same_bits,
    checkpoint,
    events,
    rows,
    saved,
    settings,
    text_event,
    train,
)
from tests.test_profile import LAYERS, C, N, read, table

accumulations = pytest.mark.parametrize("accumulated", [1, 3])


def profiled(tmp_path: Path, *overrides: str) -> Trainer:
    """A run to its end."""
    trainer = Trainer(settings(tmp_path, "backend=cupy", "profile=true", *overrides))
    assert trainer.run() == 0
    return trainer


def points(run: Path) -> list[tuple[str, int]]:
    """All of TensorBoard's but the speeds."""
    return [(tag, step) for tag, step in events(run) if tag not in MEASURED]


def names_of(engine: Any) -> list[str]:
    """Everything a captured step consists of, in order."""
    return [name for graph in engine._graphs for name in graph.names]


@pytest.mark.parametrize(("dtype", "accumulated"), [("bf16", 1), ("fp32", 3)])
def test_the_table_has_the_kernels_of_a_captured_step(dtype, accumulated, stand_ins, tmp_path):
    trainer = profiled(tmp_path, f"dtype={dtype}", f"train.grad_accum={accumulated}")
    found = Counter[str]()
    for name, row in table(trainer.config.run.path).items():
        found["gemm" if row["flops"] else name] += row["calls"]
        assert bool(row["grids"]) == (not row["flops"])
    assert found == Counter(names_of(trainer.engine))
    assert found["gemm"] == accumulated * 3 * (4 * LAYERS + 1)


@accumulations
def test_bytes_and_flops_are_those_of_the_arrays(accumulated, place, tmp_path):
    trainer = profiled(tmp_path, "dtype=bf16", f"train.grad_accum={accumulated}")
    found, dims = table(trainer.config.run.path), trainer.model.dims
    rmsnorm = 2 * LAYERS * accumulated  # y and x in bf16, rstd in float32
    assert found["rmsnorm"]["bytes"] == rmsnorm * (2 * 2 * N * C + 4 * N)
    added = found[f"bfloat16 ({N}, {C}) x ({C}, {C}) -> bfloat16, added"]  # attn_wo
    assert added["bytes"] == LAYERS * accumulated * 2 * (3 * N * C + C * C)
    assert added["flops"] == LAYERS * accumulated * 2 * N * C * C
    if place == "stand-in":  # where the relu is always faster with its product
        relu = found[f"bfloat16 ({N}, {C}) x ({C}, {4 * C}) -> bfloat16 with RELU_AUX"]
        nbytes = 2 * (N * C + 4 * C * C + 4 * N * C) + N * relu_mask_bytes(4 * C)
        assert relu["bytes"] == LAYERS * accumulated * nbytes
    wide = -(-dims.vocab_size // NARROW) * NARROW
    padded = Dims(dims.n_layer, dims.n_head, dims.n_embd, dims.block_size, wide)
    total = read(trainer.config.run.path)["total"]
    assert total["flops"] == accumulated * padded.train_flops(N, 0)
    assert total["share"] == pytest.approx(1)
    assert total["share"] == pytest.approx(sum(row["share"] for row in found.values()))


@pytest.mark.parametrize("late", [False, True])
def test_times_are_the_events_and_waited_for_once(late, monkeypatch, tmp_path):
    opened, profilers = install(monkeypatch, guarded=False, late=late), []

    def choose_and_profile(config: Config) -> Backend:
        backend = choose(config)
        opened[0].costs = {"rmsnorm": 3.0, "gemm": 0.5}
        profilers.append(make_profiler(backend, wanted=True))
        return backend

    monkeypatch.setattr("tests.cuda.engine_cases.choose", choose_and_profile)
    engine, (gpu,), (profiler,) = engine_of(tmp_path, "profile=true"), opened, profilers
    with engine.backend:
        with profiler.step(1):
            engine.train(1)
        waits = gpu.counts["waits"]  # plans of products were timed
        for step in range(2, PROFILED_STEPS + 1):
            assert profiler.take() is None
            assert gpu.counts["captures"] == 0
            with profiler.step(step):
                engine.train(step)
        assert (gpu.counts["waits"], gpu.counts["captures"]) == (waits, 1)
        profile = profiler.take()
        assert gpu.counts["waits"] > waits
        assert profile is not None
        assert profile.steps == PROFILED_STEPS - 1
        for row in profile.rows:
            cost = 500 if row.flops else 3000 if row.name == "rmsnorm" else 1000
            assert row.microseconds == cost * row.calls, row.name
        before = Counter(gpu.counts)
        for step in range(PROFILED_STEPS + 1, PROFILED_STEPS + 4):
            with profiler.step(step):
                engine.train(step)
        assert gpu.counts - before == Counter(replays=3)


def test_ranges_are_steps_kernels_and_all_between(stand_ins, monkeypatch, tmp_path):
    inside: list[str] = []
    seen: dict[str, list[str]] = {}

    @contextmanager
    def note(gpu: StandInGpu, name: str) -> Iterator[None]:
        assert not gpu.capturing
        seen.setdefault("/".join(inside), []).append(name)
        inside.append(name)
        yield
        inside.pop()

    monkeypatch.setattr(StandInGpu, "range", note)
    trainer = profiled(tmp_path, "dtype=fp32")
    kernels = names_of(trainer.engine)
    found = ["gemm" if " x " in name else name for name in seen["step 2"]]
    assert found == kernels
    assert seen.keys() == {"", *(f"step {step}" for step in range(2, PROFILED_STEPS + 1))}
    between = Counter(name for name in seen[""] if not name.startswith("step "))
    assert between == Counter(evaluation=3, samples=2, histograms=3, checkpoint=5)
    assert [name for name in seen[""] if name.startswith("step ")] == [
        f"step {step}" for step in range(1, 13)
    ]


def test_without_it_nothing_is_wrapped(stand_ins, tmp_path):
    engine = engine_of(tmp_path)
    (gpu,) = stand_ins
    assert engine.gpu is gpu
    assert engine.memory.ops.loader is gpu.loader
    with engine.backend:
        engine.train(1)
        assert gpu.counts["captures"] == 1


@pytest.mark.parametrize(("dtype", "accumulated"), [("fp32", 1), ("bf16", 3)])
def test_a_profiled_run_has_the_same_bits(accumulated, dtype, place, tmp_path):
    every = ("backend=cupy", f"dtype={dtype}", f"train.grad_accum={accumulated}")
    every = (*every, "sample.temperature=0", "checkpoint.interval=4")
    plain = train(tmp_path, *every, "run.name=plain")
    whole = train(tmp_path, *every, "run.name=whole", "profile=true")
    part = train(tmp_path, *every, "run.name=part", "profile=true", "train.stop_at=4")
    assert read(part)["steps"] == 3
    train(tmp_path, *every, "run.name=part", "profile=true", "resume=auto")
    assert read(part)["steps"] == 7
    assert read(whole)["steps"] == PROFILED_STEPS - 1
    assert saved(plain)[-1] == 12
    for run, profiles in ((whole, [10]), (part, [4, 12])):
        for step in set(saved(run)) & set(saved(plain)):
            assert_same_bits(load(checkpoint(run, step)), load(checkpoint(plain, step)))
        assert rows(run) == rows(plain)
        assert points(run) == sorted([*points(plain), *(("profile", step) for step in profiles)])
        assert {step for tag, step in events(run) if tag == "ms_per_step"} <= {12}  # of replays
    assert not list(plain.glob("profile.*"))
    assert "advance" in text_event(whole, "profile")
