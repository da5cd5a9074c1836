"""What a run will not go on from or write over, and what it then leaves as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_microgpt import cli
from gpu_microgpt.errors import ConfigError
from gpu_microgpt.trainer import Trainer
from tests.run_helpers import QUIET, contents, settings, settings_file, train, write_text


@pytest.mark.parametrize("overrides", [[], ["resume=OTHER"]])
def test_an_existing_run_is_not_overwritten(overrides: list[str], tmp_path: Path) -> None:
    other = train(tmp_path, "run.name=other", "train.stop_at=5")
    run = train(tmp_path, "train.stop_at=7")
    before = contents(tmp_path / "runs")
    given = [text.replace("OTHER", str(other)) for text in overrides]
    with pytest.raises(ConfigError, match=r"run\.name=OTHER") as error:
        Trainer(settings(tmp_path, "optimizer.lr=0.1", *given)).run()
    assert str(run) in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "runs") == before


def test_a_run_that_never_saved_is_not_overwritten_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings(tmp_path).run.path
    train(tmp_path)
    for path in (run / "checkpoints").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    before = contents(run)
    assert cli.main(["train", settings_file(tmp_path, "optimizer.lr=0.1")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert contents(run) == before


@pytest.mark.parametrize(
    ("override", "was"),
    [("n_layer=1", 2), ("n_head=4", 2), ("n_embd=16", 8), ("block_size=4", 8)],
)
def test_another_model_is_refused(override: str, was: int, tmp_path: Path) -> None:
    run = train(tmp_path, "train.stop_at=7")
    before = contents(run)
    key, _, got = override.partition("=")
    with pytest.raises(ConfigError) as error:
        Trainer(settings(tmp_path, "resume=auto", f"model.{override}")).run()
    assert str(error.value).startswith(f"model.{key}: got {got}, but the checkpoint")
    assert f"has {was}" in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(run) == before


def test_other_changes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "train.stop_at=7", *QUIET)
    capsys.readouterr()
    train(tmp_path, "resume=auto", "optimizer.lr=0.5", "train.batch_size=8", *QUIET)
    out = capsys.readouterr().out
    assert "optimizer.lr 0.01 -> 0.5" in out
    assert "train.batch_size 4 -> 8" in out


def test_where_and_how_it_is_computed_may_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "train.stop_at=7", *QUIET)
    capsys.readouterr()
    elsewhere = ("device=1", "backend=numpy", "threads=2", "profile=true", "sample.num=0")
    train(tmp_path, "resume=auto", *elsewhere, *QUIET)
    assert "settings changed" not in capsys.readouterr().out


def test_another_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, "train.stop_at=7")
    write_text(tmp_path, seed=2)
    before = contents(run)
    capsys.readouterr()
    assert cli.main(["train", settings_file(tmp_path, "resume=auto")]) == 2
    err = capsys.readouterr().err
    assert "no longer the text this run was trained on" in err
    assert err.count("\n") == 1
    assert contents(run) == before
