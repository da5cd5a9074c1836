"""profile=true on the CPU: a table of operations, of a run that is otherwise the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gpu_microgpt import engine
from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.checkpoint import load
from gpu_microgpt.host_step import HostEngine
from gpu_microgpt.profile import PROFILED_STEPS, Launch, Profile, Profiler
from gpu_microgpt.trainer import Trainer
from tests.run_helpers import (
    QUIET,
    assert_same_bits,
    checkpoint,
    events,
    rows,
    saved,
    settings,
    share_every_step,
    text_event,
    train,
)

NUMPY = ("backend=numpy", "data.mode=stream")
N, C, LAYERS = 32, 8, 2  # rows of a micro-batch, channels, layers


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "profile.json").read_text())


def table(run: Path) -> dict[str, dict[str, Any]]:
    """Its rows by name."""
    return {row["name"]: row for row in read(run)["rows"]}


class Counting:
    """Operations that count their calls."""

    def __init__(self, ops: Any, counts: Counter[str]) -> None:
        self._ops, self._counts = ops, counts

    def __getattr__(self, name: str) -> Any:
        self._counts[name] += 1
        return getattr(self._ops, name)


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_table_has_the_operations_of_a_step(threads, accumulated, tmp_path, monkeypatch):
    share_every_step(monkeypatch)
    args = (*NUMPY, *QUIET, "sample.num=0", "data.val_fraction=0", f"threads={threads}")
    args = (*args, f"train.grad_accum={accumulated}")
    found = table(train(tmp_path, *args, "profile=true"))
    counts, ops = Counter[str](), NumpyBackend.ops
    monkeypatch.setattr(engine, "_host_engine", lambda backend: HostEngine)  # none is recorded
    monkeypatch.setattr(NumpyBackend, "ops", lambda *a: Counting(ops(*a), counts))
    train(tmp_path, *args, "run.name=counted")
    assert {name: 12 * row["calls"] for name, row in found.items()} == counts
    assert found["rmsnorm"]["calls"] == 2 * LAYERS * threads * accumulated


def test_bytes_and_flops_are_those_of_the_arrays(tmp_path):
    config = settings(tmp_path, *NUMPY, *QUIET, "profile=true", "dtype=fp64")
    trainer = Trainer(config)
    trainer.run()
    found, dims = table(config.run.path), trainer.model.dims
    assert found["rmsnorm"]["bytes"] == 8 * 2 * LAYERS * (2 * N * C + N)  # y, x, rstd
    hidden = 2 * N * 4 * C + 2 * 4 * C * C + N * C  # dx and x, dw and w, dy
    assert found["relu_linear_backward"]["bytes"] == 8 * LAYERS * hidden
    products = sum(row["flops"] for row in found.values())
    assert products == dims.train_flops(N, 0) == read(config.run.path)["total"]["flops"]
    assert found["attention"]["flops"] == 0


def test_a_profiled_run_is_the_same_run(tmp_path, capsys):
    plain = train(tmp_path, "backend=numpy", "run.name=plain")
    run = train(tmp_path, "backend=numpy", "run.name=part", "profile=true", "train.stop_at=4")
    assert read(run)["steps"] == 3  # a short session writes what it has
    train(tmp_path, "backend=numpy", "run.name=part", "train.stop_at=7", "resume=auto")
    assert read(run)["steps"] == 3
    capsys.readouterr()
    train(tmp_path, "backend=numpy", "run.name=part", "profile=true", "resume=auto")
    assert read(run)["steps"] == 4
    assert "settings changed" not in capsys.readouterr().out
    for step in set(saved(run)) & set(saved(plain)):
        assert_same_bits(load(checkpoint(run, step)), load(checkpoint(plain, step)))
    assert 12 in saved(run)
    assert rows(run) == rows(plain)
    assert events(run) == sorted([*events(plain), ("profile", 4), ("profile", 12)])
    assert not list(plain.glob("profile.*"))


def test_what_is_told(tmp_path, capsys):
    run = train(tmp_path, "backend=numpy", "profile=true")
    text, lines = (run / "profile.md").read_text(), capsys.readouterr().out.splitlines()
    told = lines.index(f"step {PROFILED_STEPS}: profile ({run / 'profile.md'})")
    largest = sorted(read(run)["rows"], key=lambda row: -row["microseconds"])[:5]
    assert [line.split()[-1] for line in lines[told + 1 : told + 6]] == [r["name"] for r in largest]
    assert lines[told + 6].startswith("step 10/12")
    assert text_event(run, "profile") == "\n".join("    " + line for line in text.split("\n"))
    cells = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in cells} == {7}
    assert [row[0].strip(" `") for row in cells[2:7]] == [row["name"] for row in largest]
    assert cells[-1][0].strip(" `") == "total"
    assert text.startswith(f"# Profile of {PROFILED_STEPS - 1} steps\n\nnumpy ")


def test_of_one_step_there_is_no_profile(tmp_path, capsys):
    run = train(tmp_path, "backend=numpy", "profile=true", "train.steps=1")
    assert "step 1: no profile, as only one step was done; wanted two" in capsys.readouterr().out
    assert not list(run.glob("profile.*"))


def test_without_it_nothing_is_wrapped(tmp_path):
    config = settings(tmp_path, "backend=numpy", "kernels=reference", "train.steps=2")
    trainer = Trainer(config)
    trainer.run()
    assert type(trainer.engine.memory.ops).__name__ == "ReferenceOps"


def profile_of(*steps: dict[str, list[tuple[float, float, float]]]) -> Profile:
    """From (milliseconds, bytes, flops) of each launch, by step and name."""
    profiler = Profiler(len(steps) + 1)
    for number, step in enumerate([{}, *steps]):
        with profiler.step(number):
            for name, launches in step.items():
                for ms, nbytes, flops in launches:
                    profiler.note_launch(Launch(name, nbytes, flops, lambda ms=ms: ms))
    profile = profiler.take()
    assert profile is not None
    assert profiler.take(at_end=True) is None
    return profile


def test_figures_are_medians_over_the_steps():
    a, b = [(1.0, 4000.0, 0.0), (2.0, 2000.0, 0.0)], [(6.0, 600.0, 12e9)]
    slow = [(50.0, 4000.0, 0.0), (50.0, 2000.0, 0.0)]
    profile = profile_of({"a": a, "b": b}, {"a": slow, "b": b}, {"a": a, "b": b})
    first, second = profile.rows
    assert (first.name, first.calls, first.microseconds, first.flops) == ("b", 1, 6000, 12e9)
    assert (second.name, second.calls, second.microseconds, second.bytes) == ("a", 2, 3000, 6000)
    assert [first.share, second.share] == pytest.approx([2 / 3, 1 / 3])
    assert first.cells() == ["b", "1", "6,000.0", "66.7%", "600", "0.0", "2"]
    assert profile.total().cells() == ["total", "3", "9,000.0", "100.0%", "6,600", "0.0", "1.33"]


def test_a_step_that_fails_is_the_last_recorded():
    profiler = Profiler(3)
    with profiler.step(1):
        assert not profiler.recording
    with pytest.raises(ZeroDivisionError), profiler.step(2):
        _ = 1 / (1 - profiler.recording)
    assert not profiler.recording
