"""Nothing a user does at the edge costs a trained step, a checkpoint, or a clear word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_microgpt import cli
from gpu_microgpt.config import Config
from gpu_microgpt.trainer import Trainer
from tests.run_helpers import (
    QUIET,
    ROOT,
    checkpoint,
    contents,
    environment,
    saved,
    settings,
    settings_file,
    train,
    write_text,
)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that must fail."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_unknown_letter_in_the_sample_prompt_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "train", settings_file(tmp_path, "sample.prompt=Z"))
    assert "sample.prompt: got characters outside the vocabulary: 'Z'" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["1e-3", "1e5", ".5e1", "null", "true", "12"])
def test_settings_read_back_whatever_the_text(text: str, tmp_path: Path) -> None:
    config = settings(tmp_path, f'run.name="{text}"', f'sample.prompt="{text}"')
    file = tmp_path / "again.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert Config.load(file) == config


def test_a_newer_checkpoint_that_cannot_be_read_is_not_deleted(tmp_path: Path) -> None:
    run = train(tmp_path, "train.stop_at=10", *QUIET)
    newest = checkpoint(run, 10) / "state.json"
    document = json.loads(newest.read_text())
    newest.write_text(json.dumps(document | {"format_version": 99}))
    train(tmp_path, "train.stop_at=7", "resume=auto", *QUIET)
    assert json.loads(newest.read_text())["format_version"] == 99
    assert saved(run) == [5, 7, 10]


def test_nothing_is_removed_where_no_step_is_left(tmp_path: Path) -> None:
    run = train(tmp_path, "train.stop_at=10", *QUIET)
    before = contents(run)
    train(tmp_path, f"resume={checkpoint(run, 5)}", "train.stop_at=5", *QUIET)
    assert contents(run) == before


def test_a_run_that_goes_on_from_another_holds_its_checkpoint(tmp_path: Path) -> None:
    first = train(tmp_path, "train.stop_at=10", *QUIET)
    new = ["run.name=new", "checkpoint.interval=0", *QUIET]
    other = settings(tmp_path, f"resume={first}", "train.steps=12", *new)
    assert Trainer(other).run() == 0
    assert saved(other.run.path) == [10, 12]


def test_one_program_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, "train.stop_at=5", *QUIET)
    hold = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(run / ".lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    line = refused(capsys, "train", settings_file(tmp_path, "resume=auto", *QUIET))
    holder.communicate()
    assert "another program is training in" in line
    assert cli.main(["train", settings_file(tmp_path, "resume=auto", *QUIET)]) == 0


def test_a_huge_log_interval_costs_no_memory(tmp_path: Path) -> None:
    run = train(tmp_path, f"train.log_interval={10**15}", *QUIET)
    assert saved(run)[-1] == 12


def test_epochs_count_samples(tmp_path: Path) -> None:
    write_text(tmp_path, count=10)
    epochs = ["train.steps=null", "train.epochs=10", "train.batch_size=8", "data.val_fraction=0"]
    run = train(tmp_path, *epochs, *QUIET)
    assert saved(run)[-1] == 13  # 100 samples in batches of 8


def test_a_split_does_not_change_under_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "train.stop_at=5", *QUIET)
    line = refused(capsys, "train", settings_file(tmp_path, "resume=auto", "seed=2"))
    assert "seed: got 2, but the checkpoint to resume has 1337" in line


def test_a_fallback_run_goes_on_when_the_data_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("GPU_MICROGPT_DATA", raising=False)
    path = tmp_path / "cache" / "page"
    source = ["data.source=http://127.0.0.1:9/page", "data.fallback=stdlib-words"]
    train(tmp_path, *source, "train.stop_at=5", *QUIET)
    monkeypatch.setattr("gpu_microgpt.data.corpus._cached", lambda *_: path)  # it would be there
    train(tmp_path, *source, "resume=auto", *QUIET)
    assert "was trained on stdlib-words and goes on with it" in capsys.readouterr().out


def test_perplexity_beyond_floats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rate = ["optimizer.lr=1e4", "schedule.name=constant", "schedule.warmup_fraction=0"]
    run = train(tmp_path, *rate, "train.stop_at=3", *QUIET)
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] > 700
    assert figures["perplexity"] is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_one_line(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "train.py"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(script), settings_file(tmp_path, *QUIET)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("error: output: No space left")


def test_a_terminal_without_the_letters(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("äß\n€ü\n" * 30, encoding="utf-8")
    run = train(tmp_path, *QUIET)
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), str(run)]
    plain = environment() | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\x" in done.stdout or "\\u" in done.stdout
