"""A loss that is not finite ends the run in one line, and the last good checkpoint stays."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_microgpt import cli, engine
from gpu_microgpt.backend import numpy as numpy_backend
from gpu_microgpt.checkpoint import newest
from gpu_microgpt.data.dataset import Split
from gpu_microgpt.host_step import HostEngine
from gpu_microgpt.model import GPT
from tests.run_helpers import (
    QUIET,
    ROOT,
    assert_same_run,
    checkpoint,
    contents,
    environment,
    no_warning,
    rows,
    saved,
    settings,
    settings_file,
    train,
)

# the arithmetic of a run that blows up warns on its way
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@contextmanager
def spoiled(step: int, value: float) -> Iterator[None]:
    """Within it a loss is `value` from the step numbered `step` (from 1) on."""
    draw, backward, now = Split.batch, GPT.backward, 0

    def batch(self: Split, index: int, micro: int = 0) -> Any:
        nonlocal now
        now = index + 1
        return draw(self, index, micro)

    def spoil(self: GPT, *args: Any, **options: Any) -> Any:
        losses = backward(self, *args, **options)
        if now >= step:
            losses[0] = value
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_host_engine", lambda backend: HostEngine)  # steps made in Python
        patch.setattr(Split, "batch", batch)
        patch.setattr(GPT, "backward", spoil)
        yield


def one_line(err: str) -> str:
    """The error's only line."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("log_interval", [1, 3, 100])
def test_loss_not_finite(
    value: float,
    log_interval: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Step 8 goes wrong; the checkpoint of step 6 stays, and none is made from step 8 on."""
    overrides = ["checkpoint.interval=2", "checkpoint.keep=1", *QUIET]
    overrides += [f"train.log_interval={log_interval}", "schedule.name=constant"]
    good = train(tmp_path, "run.name=good", "train.stop_at=6", *overrides)
    capsys.readouterr()
    with spoiled(8, value):
        assert cli.main(["train", settings_file(tmp_path, *overrides)]) == 2
    line = one_line(capsys.readouterr().err)
    assert f"step 8: loss {value:g}, gradient norm " in line
    assert "learning rate 0.01," in line
    assert "optimizer.lr" in line
    assert "the checkpoint of step 6 is kept" in line
    run = settings(tmp_path).run.path
    assert saved(run) == [6]
    for name in ("weights.safetensors", "optimizer.safetensors"):
        ours, theirs = (checkpoint(r, 6) / name for r in (run, good))
        assert ours.read_bytes() == theirs.read_bytes()
    assert all(math.isfinite(row["loss/train"]) for row in rows(run))


def test_the_run_can_go_on(tmp_path: Path) -> None:
    straight = train(tmp_path, "run.name=straight")
    with spoiled(8, math.nan):
        assert cli.main(["train", settings_file(tmp_path)]) == 2
    run = train(tmp_path, "resume=auto")
    assert_same_run(run, straight, 12)


def test_nothing_saved_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with spoiled(1, math.nan):
        assert cli.main(["train", settings_file(tmp_path)]) == 2
    assert "no checkpoint was saved yet" in one_line(capsys.readouterr().err)
    assert not (settings(tmp_path).run.path / "checkpoints").exists()


def test_asked_to_stop_at_that_very_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would have been seen at the next logged step is seen before it is saved."""
    with spoiled(7, math.nan):
        draw = Split.batch

        def batch(self: Split, index: int, micro: int = 0) -> Any:
            if index == 6:
                signal.raise_signal(signal.SIGTERM)
            return draw(self, index, micro)

        monkeypatch.setattr(Split, "batch", batch)
        assert cli.main(["train", settings_file(tmp_path, "train.log_interval=100", *QUIET)]) == 2
        monkeypatch.undo()
    assert "step 7: loss nan" in one_line(capsys.readouterr().err)
    assert saved(settings(tmp_path).run.path) == [5]


@pytest.mark.parametrize("rate", ["1e30", "1e39"])
@pytest.mark.parametrize("eval_interval", [0, 1])
def test_absurd_rate(
    rate: str, eval_interval: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No checkpoint that holds infinities, or comes of a held-out loss that is not finite."""
    overrides = [f"optimizer.lr={rate}", "checkpoint.interval=1", "schedule.warmup_fraction=0"]
    overrides += ["schedule.name=constant"]
    overrides += ["train.log_interval=100", *QUIET, f"train.eval_interval={eval_interval}"]
    train(tmp_path, "train.stop_at=5", *QUIET)
    capsys.readouterr()
    assert cli.main(["train", settings_file(tmp_path, "resume=auto", *overrides)]) == 2
    line = one_line(capsys.readouterr().err)
    assert re.search(r"step \d+: .*optimizer.lr", line)
    run = settings(tmp_path).run.path
    assert 5 in saved(run)
    state = newest(run / "checkpoints", no_warning)
    assert all(np.isfinite(array).all() for array in state.weights.values())
    assert all(math.isfinite(v) for row in rows(run) for v in row.values() if v is not None)


@pytest.mark.parametrize("threads", [1, 2])
def test_in_the_middle_of_a_compiled_call(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """All steps are done before a figure is seen; said is the first that was not finite."""
    pytest.importorskip("numba", reason="steps are done together where they are compiled")
    draw, calls = Split.sequences, []

    def sequences(self: Split, step: int, steps: int) -> Any:
        calls.append(steps)
        return draw(self, step, steps)

    if threads > 1:
        monkeypatch.setattr(numpy_backend, "SHARD_FLOPS", 0.0)  # so small a step, in two shards
    monkeypatch.setattr(Split, "sequences", sequences)
    rates = ["optimizer.lr=1e30", "schedule.name=constant", "schedule.warmup_fraction=0"]
    args = [*rates, *QUIET, f"threads={threads}", "train.steps=100", "checkpoint.interval=0"]
    said = []
    for kernels, log_interval in (("reference", 1), ("compiled", 100)):
        more = [f"kernels={kernels}", f"train.log_interval={log_interval}", f"run.name={kernels}"]
        assert cli.main(["train", settings_file(tmp_path, *args, *more)]) == 2
        said.append(one_line(capsys.readouterr().err))
        assert not (settings(tmp_path, *more).run.path / "checkpoints").exists()
    assert calls[-1] == 100
    step = [int(re.findall(r"step (\d+): loss \S+, gradient norm ", line)[0]) for line in said]
    assert 1 < step[0] == step[1] < 100
    assert said[1].endswith("no checkpoint was saved yet")


def test_going_on_as_the_message_says(tmp_path: Path) -> None:
    """A run begun from another's checkpoint: nothing of its own is saved when it diverges."""
    other = train(tmp_path, "run.name=other", "train.stop_at=5", *QUIET)
    before = contents(other)
    file = settings_file(tmp_path, "optimizer.lr=1e30", "schedule.warmup_fraction=0", *QUIET)
    failed = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), file, f"resume={other}"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 2
    command = one_line(failed.stderr).partition("go on with: ")[2]
    again = subprocess.run(
        command.replace("LOWER", "0.01"), shell=True, cwd=tmp_path, env=environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "resumed at step 5\n" in again.stdout
    assert contents(other) == before
