"""N steps straight = k steps, stop, go on, N - k steps: the same bits and the same story."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.checkpoint import load
from gpu_microgpt.errors import CheckpointError
from gpu_microgpt.trainer import Trainer
from tests.run_helpers import (
    assert_same_bits,
    assert_same_run,
    checkpoint,
    contents,
    environment,
    events,
    read_until,
    rows,
    saved,
    settings,
    settings_file,
    share_every_step,
    start_training,
    train,
    truncate,
)

N = 12
MICROGPT = ["rng=microgpt", "data.val_fraction=0", "train.batch_size=1", "dtype=fp64"]
CASES = [
    ([], (7,)),
    (["train.grad_accum=2"], (1, 5)),
    (["threads=2", "train.grad_accum=2"], (7, 9)),
    (["data.mode=stream"], (7,)),
    (["data.mode=stream", "data.order=random", "threads=2", "train.grad_accum=2"], (5, 11)),
    (["data.order=random", "optimizer.name=adamw", "optimizer.weight_decay=0.1"], (3,)),
    (["data.mode=stream", "optimizer.grad_clip=0.1", "train.log_interval=5"], (8,)),
    (["train.log_interval=1", "train.epochs=2", "train.steps=null", "train.batch_size=12"], (4,)),
    (MICROGPT, (7,)),
]


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Let tiny steps count as worth a shard a thread; filled with how many there really were."""
    seen: set[int] = set()
    run = NumpyBackend.run

    def count(self: NumpyBackend, tasks: Sequence[Callable[[], None]]) -> None:
        seen.add(len(tasks))
        run(self, tasks)

    monkeypatch.setattr(NumpyBackend, "run", count)
    share_every_step(monkeypatch)
    return seen


@pytest.mark.parametrize(("overrides", "stops"), CASES)
def test_resumed_is_straight(
    overrides: list[str],
    stops: tuple[int, ...],
    side_by_side: set[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight = train(tmp_path, "run.name=straight", *overrides)
    for stop in stops:
        run = train(tmp_path, *overrides, "resume=auto", f"train.stop_at={stop}")
        assert saved(run)[-1] == stop
        assert all(row["step"] <= stop for row in rows(run))
        assert all(step <= stop for _, step in events(run))
    run = train(tmp_path, *overrides, "resume=auto")
    assert f"resumed at step {stops[-1]}" in capsys.readouterr().out
    assert_same_run(run, straight, N)
    assert max(side_by_side | {1}) == 1 + ("threads=2" in overrides)


def test_every_step_is_in_the_files(tmp_path: Path) -> None:
    for stop in (5, 7, 12):
        run = train(tmp_path, "resume=auto", f"train.stop_at={stop}")
    steps = {"loss/train": range(2, 13, 2), "loss/val": (4, 8, 12), "samples": (6, 12)}
    for tag, wanted in steps.items():
        assert [step for name, step in events(run) if name == tag] == list(wanted), tag
        if tag != "samples":
            assert [row["step"] for row in rows(run) if tag in row] == list(wanted)


def test_a_finished_run_has_nothing_left_to_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path)
    before = (contents(run / "checkpoints"), rows(run), events(run))
    train(tmp_path, "resume=auto")
    assert "nothing left to train" in capsys.readouterr().out
    assert (contents(run / "checkpoints"), rows(run), events(run)) == before


def test_killed_again_and_again(tmp_path: Path) -> None:
    """SIGKILL while it trains, logs and saves; then on from the last checkpoint."""
    overrides = ["train.steps=160", "train.log_interval=1", "checkpoint.interval=7"]
    straight = train(tmp_path, "run.name=straight", *overrides)
    file = settings_file(tmp_path, *overrides, "resume=auto")
    for step in (2, 20, 40):
        process = start_training(tmp_path, file)
        read_until(process, f"step {step:3}/160")
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    run = train(tmp_path, *overrides, "resume=auto")
    assert_same_run(run, straight, 160)


def damage_weights(path: Path) -> None:
    truncate(path / "weights.safetensors")


def damage_state(path: Path) -> None:
    text = (path / "state.json").read_text(encoding="utf-8")
    (path / "state.json").write_text(text.replace('"step"', '"stop"'), encoding="utf-8")


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "optimizer.safetensors").write_bytes(data)


@pytest.mark.parametrize("damage", [damage_weights, damage_state, flip_a_bit])
def test_damaged_newest_checkpoint(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train(tmp_path, "run.name=straight")
    run = train(tmp_path, "train.stop_at=11")
    newest, *_ = sorted((run / "checkpoints").iterdir(), reverse=True)
    assert newest == checkpoint(run, 11)
    damage(newest)
    capsys.readouterr()
    train(tmp_path, "resume=auto")
    out = capsys.readouterr().out
    warnings = [line for line in out.splitlines() if str(newest) in line]
    assert warnings[0].startswith("skipped checkpoint")
    assert "resumed at step 10" in out
    assert_same_run(run, straight, N)


def test_no_good_checkpoint_is_left(tmp_path: Path) -> None:
    run = train(tmp_path, "train.stop_at=6")
    for path in (run / "checkpoints").iterdir():
        damage_weights(path)
    before = contents(run)
    with pytest.raises(CheckpointError, match="none of the"):
        Trainer(settings(tmp_path, "resume=auto")).run()
    assert contents(run) == before


def test_back_to_an_earlier_checkpoint_of_its_own(tmp_path: Path) -> None:
    straight = train(tmp_path, "run.name=straight", "checkpoint.keep=9")
    run = train(tmp_path, "checkpoint.keep=9")
    assert saved(run) == [4, 5, 8, 10, 12]
    train(tmp_path, f"resume={checkpoint(run, 5)}", "train.stop_at=7", "checkpoint.keep=9")
    assert saved(run) == [4, 5, 7]
    train(tmp_path, "resume=auto", "checkpoint.keep=9")
    assert_same_run(run, straight, N)


def test_back_to_an_earlier_checkpoint_on_another_way(tmp_path: Path) -> None:
    """What came after it in the files gives way to what comes now."""
    run = train(tmp_path, "checkpoint.keep=9")
    overrides = [f"resume={checkpoint(run, 5)}", "optimizer.lr=0.05"]
    branch = train(tmp_path, "run.name=branch", *overrides)
    before = [row for row in rows(run) if row["step"] <= 5]
    train(tmp_path, *overrides)
    assert rows(run) == before + rows(branch)
    steps = [step for tag, step in events(run) if tag == "loss/train"]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_the_best_so_far_is_remembered(tmp_path: Path) -> None:
    """The rate is absurd, so that nothing after the stop is as good as before it."""
    overrides = ["train.steps=30", "optimizer.lr=0.5", "train.eval_interval=3"]
    overrides += ["checkpoint.interval=0", "checkpoint.keep=9"]
    straight = train(tmp_path, "run.name=straight", *overrides)
    best = saved(straight)[-2]  # only the best ones and the last are saved
    assert best <= 15
    train(tmp_path, "train.stop_at=16", *overrides)
    run = train(tmp_path, "resume=auto", *overrides)
    assert saved(run) == [*saved(straight)[:-1], 16, 30]
    assert_same_run(run, straight, 30)


@pytest.mark.parametrize("what", ["run", "checkpoints", "one"])
def test_another_runs_checkpoint_in_a_new_folder(what: str, tmp_path: Path) -> None:
    run = train(tmp_path, "train.stop_at=7")
    before = contents(run)
    path = {"run": run, "checkpoints": run / "checkpoints", "one": checkpoint(run, 7)}[what]
    new = train(tmp_path, f"resume={path}", "run.name=new")
    assert contents(run) == before
    assert [row["step"] for row in rows(new)] == [8, 8, 10, 12, 12]  # training and held-out
    assert min(step for _, step in events(new)) == 8
    straight = train(tmp_path, "run.name=straight")
    assert_same_bits(load(checkpoint(new, N)), load(checkpoint(straight, N)))


def test_without_a_checkpoint_auto_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, "resume=auto")
    assert "this is a new run" in capsys.readouterr().out
    straight = train(tmp_path, "run.name=straight")
    assert_same_run(run, straight, N)


def test_the_printed_command_resumes(tmp_path: Path) -> None:
    """Also where the folder's name has a blank in it."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    straight = train(folder, "run.name=straight")
    file = settings_file(folder, "train.stop_at=7")
    stopped = subprocess.run(
        [sys.executable, "scripts/train.py", file],
        cwd=environment()["PYTHONPATH"], env=environment(), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    [line] = [li for li in stopped.stdout.splitlines() if li.startswith("go on with:")]
    command = line.removeprefix("go on with:").strip()
    assert " scripts/train.py " in command
    resumed = subprocess.run(
        command, shell=True, cwd=environment()["PYTHONPATH"], env=environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 7" in resumed.stdout
    assert_same_run(folder / "runs" / "run", straight, N)


def test_the_last_line_says_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, "train.eval_interval=5", "train.log_interval=1", "train.stop_at=7")
    told: dict[int, dict[str, Any]] = {}
    for row in rows(run):
        told.setdefault(row["step"], {}).update(row)
    losses = [told[step]["loss/train"] for step in range(1, 8)]
    out = capsys.readouterr().out
    line = f"step 7: training loss {losses[-1]:.4f}, mean of the last 7 steps {np.mean(losses):.4f}"
    held = f"{told[5]['loss/val']:.4f}"
    assert f"{line}; held-out loss {held} (step 5), lowest {held}\n" in out
    assert "go on with: " in out
    train(tmp_path, "train.eval_interval=5", "train.log_interval=1", "resume=auto")
    out = capsys.readouterr().out
    assert "step 12: training loss" in out
    assert "(step " not in out.split("step 12: training loss")[1]
    assert "go on with: " not in out
