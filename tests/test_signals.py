"""Ctrl-C and SIGTERM: the step is finished, saved, and the way to go on said."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_microgpt import cli
from gpu_microgpt.checkpoint import newest
from gpu_microgpt.data.dataset import Split
from tests.run_helpers import (
    Trap,
    assert_same_run,
    environment,
    no_warning,
    read_until,
    saved,
    settings,
    settings_file,
    start_training,
    train,
)

N = 12
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell's background job starts with SIGINT ignored; Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(number: signal.Signals = signal.SIGINT, times: int = 1) -> Callable[[], None]:
    def send() -> None:
        for _ in range(times):
            signal.raise_signal(number)

    return send


def train_until(
    text: str, action: Callable[[], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    """Train; act when `text` is printed; return the exit code and all that was printed."""
    file = settings_file(folder, "resume=auto", "checkpoint.interval=0")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", trap := Trap(text, action))
        code = cli.main(["train", file])
    assert trap.sprung
    return code, trap.getvalue()


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize(
    ("text", "step"),
    [("step  2/12", 2), ("step 4: held-out loss", 4), ("step 6: samples", 6), ("step 10/12", 10)],
)
def test_while_it_reports(
    text: str,
    step: int,
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At whatever moment it comes, the step it stops at is saved, and the run can go on."""
    handlers = [signal.getsignal(n) for n in CODES]
    code, out = train_until(text, interrupt(number), tmp_path, monkeypatch)
    assert code == CODES[number]
    assert capsys.readouterr().err == ""
    [last] = [line for line in out.splitlines() if line.startswith("stopped at step")]
    assert "resume=auto" in last
    run = settings(tmp_path).run.path
    stopped = int(last.removeprefix("stopped at step ").split(",")[0])
    assert step <= stopped <= step + 1
    assert saved(run)[-1] == stopped
    assert [signal.getsignal(n) for n in CODES] == handlers
    straight = train(tmp_path, "run.name=straight", "checkpoint.interval=0")
    train(tmp_path, "resume=auto", "checkpoint.interval=0")
    assert_same_run(run, straight, N)


@pytest.mark.parametrize(("kernels", "stopped"), [("reference", 7), ("auto", 8)])
def test_in_the_middle_of_a_step(
    kernels: str, stopped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled steps are done two by two, as often as they are logged, and so is what stops."""
    if kernels == "auto":
        pytest.importorskip("numba")
    original, size = Split.draw, settings(tmp_path).train.batch_size

    def draw(self: Split, first: int, count: int) -> Any:
        if first <= 6 * size < first + count:  # the seventh step's
            signal.raise_signal(signal.SIGTERM)
        return original(self, first, count)

    args = [f"kernels={kernels}"]
    with monkeypatch.context() as patch:
        patch.setattr(Split, "draw", draw)
        assert cli.main(["train", settings_file(tmp_path, *args)]) == 143
    run = settings(tmp_path).run.path
    assert saved(run)[-1] == stopped
    straight = train(tmp_path, "run.name=straight", *args)
    train(tmp_path, "resume=auto", *args)
    assert_same_run(run, straight, N)


def test_in_the_last_step_it_is_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = train_until("step 12: samples", interrupt(), tmp_path, monkeypatch)
    assert code == 0
    assert "stopped" not in out
    assert saved(settings(tmp_path).run.path)[-1] == N


def test_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = train_until("model: ", interrupt(), tmp_path, monkeypatch)
    assert code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not settings(tmp_path).run.path.exists()


def test_a_second_one_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was saved before is still there, and the run can go on from it."""
    straight = train(tmp_path, "run.name=straight", "checkpoint.interval=0")
    run = train(tmp_path, "train.stop_at=5", "checkpoint.interval=0")
    capsys.readouterr()
    code, out = train_until("step 10/12", interrupt(times=2), tmp_path, monkeypatch)
    assert code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert "stopped at step" not in out
    assert newest(run / "checkpoints", no_warning).step == 8  # its held-out loss was the lowest
    train(tmp_path, "resume=auto", "checkpoint.interval=0")
    assert_same_run(run, straight, N)


@pytest.mark.parametrize("number", CODES)
def test_a_process_of_its_own(number: signal.Signals, tmp_path: Path) -> None:
    file = settings_file(tmp_path, "train.steps=200", "train.log_interval=1")
    process = start_training(tmp_path, file)
    read_until(process, "step  30/200")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (CODES[number], "")
    [line] = [line for line in out.splitlines() if line.startswith("stopped at step")]
    command = line.partition("go on with: ")[2]
    step = saved(settings(tmp_path).run.path)[-1]
    assert line.startswith(f"stopped at step {step}, saved")
    again = subprocess.run(
        f"{command} train.stop_at={step + 1}", shell=True, cwd=tmp_path, env=environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {step}\n" in again.stdout
