"""Saving, finding and rotating checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpu_microgpt import checkpoint
from gpu_microgpt.checkpoint import OPTIMIZER, STATE, WEIGHTS, State
from gpu_microgpt.errors import CheckpointError
from tests.checkpoint_helpers import (
    assert_same,
    make_state,
    names,
    no_warning,
    one_line,
    truncate,
)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: str) -> None:
    state = make_state(100, 1.0 / 3.0, dtype)
    path = checkpoint.save(tmp_path / "run" / "checkpoints", state, keep=3)
    assert path == tmp_path / "run" / "checkpoints" / "step-00000100"
    assert names(path) == sorted([WEIGHTS, OPTIMIZER, STATE])
    assert_same(checkpoint.load(path), state)


def test_special_values_and_strided_arrays_survive(tmp_path: Path) -> None:
    state = make_state(1)
    special = np.array([[np.inf, -np.inf, -0.0], [1e-45, np.nan, 3.4e38]], dtype=np.float32)
    for kind in ("", "m.", "v."):
        target = state.moments if kind else state.weights
        target[f"{kind}turned"] = special.T
        target[f"{kind}skipped"] = np.arange(20.0)[::-3]
    assert_same(checkpoint.load(checkpoint.save(tmp_path, state, keep=1)), state)


def test_weights_alone_need_no_optimizer_file(tmp_path: Path) -> None:
    state = make_state(3)
    path = checkpoint.save(tmp_path, state, keep=1)
    (path / OPTIMIZER).unlink()
    state.moments = {}
    assert_same(checkpoint.load(path, with_moments=False), state)
    assert_same(checkpoint.newest(tmp_path, no_warning, with_moments=False), state)
    assert_same(checkpoint.best(tmp_path, no_warning, with_moments=False), state)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors cannot be read"):
        checkpoint.load(path)


def test_files_are_readable_by_others_as_umask_allows(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").touch()
    path = checkpoint.save(tmp_path / "checkpoints", make_state(1), keep=1)
    assert path.stat().st_mode == plain.stat().st_mode
    assert (path / WEIGHTS).stat().st_mode == (plain / "file").stat().st_mode


@pytest.mark.parametrize(
    ("losses", "keep", "left"),
    [
        ([None, None, None, None], 2, [4, 3]),
        ([3.0, 1.0, 2.0, 2.5, 2.4], 2, [5, 4, 2]),
        ([3.0, 1.0, 2.0, 2.5, 0.5], 1, [5]),
        ([1.0, math.nan, -math.inf, None, 2.0], 1, [5, 1]),
        ([1.0, 1.0, 1.0], 1, [3]),
    ],
)
def test_rotation_keeps_the_last_and_the_best(
    tmp_path: Path, losses: list[float | None], keep: int, left: list[int]
) -> None:
    for step, loss in enumerate(losses, start=1):
        checkpoint.save(tmp_path, make_state(step, loss), keep)
    assert checkpoint.saved_steps(tmp_path) == left
    assert names(tmp_path) == sorted(f"step-{step:08d}" for step in left)
    for step in left:
        checkpoint.load(tmp_path / checkpoint.checkpoint_name(step))


def test_rotation_neither_counts_nor_deletes_what_it_cannot_read(tmp_path: Path) -> None:
    for step in range(1, 5):
        checkpoint.save(tmp_path, make_state(step), keep=9)
    truncate(tmp_path / "step-00000003" / WEIGHTS)
    checkpoint.save(tmp_path, make_state(5), keep=2)
    assert checkpoint.saved_steps(tmp_path) == [5, 4, 3]


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.keep is 0"):
        checkpoint.save(tmp_path, make_state(1), keep=0)


def test_best_ranks_by_val_loss_then_by_age(tmp_path: Path) -> None:
    for step, loss in enumerate([2.0, 1.0, 1.0, None, math.nan], start=1):
        checkpoint.save(tmp_path, make_state(step, loss), keep=9)
    found = []
    for _ in range(5):
        found.append(checkpoint.best(tmp_path, no_warning).step)
        shutil.rmtree(tmp_path / checkpoint.checkpoint_name(found[-1]))
    assert found == [3, 2, 1, 5, 4]


@pytest.mark.parametrize("choose", [checkpoint.newest, checkpoint.best])
def test_no_checkpoint_at_all(tmp_path: Path, choose: Callable[..., State]) -> None:
    (tmp_path / "step-1").mkdir()  # not our name
    (tmp_path / "step-00000001.partial").mkdir()
    for folder in (tmp_path, tmp_path / "absent"):
        assert checkpoint.saved_steps(folder) == []
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            choose(folder, no_warning)


def test_find_takes_a_run_a_checkpoints_folder_or_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, loss in ((1, 0.5), (2, 0.7)):
        checkpoint.save(run / "checkpoints", make_state(step, loss), keep=5)
    for path in (run, run / "checkpoints"):
        assert checkpoint.find(path, warn=no_warning).step == 1
        assert checkpoint.find(path, "last", warn=no_warning).step == 2
        assert checkpoint.find(path, with_moments=False, warn=no_warning).moments == {}
    assert checkpoint.find(run / "checkpoints" / "step-00000002", warn=no_warning).step == 2
    moved = (run / "checkpoints" / "step-00000002").rename(tmp_path / "my favourite")
    assert checkpoint.find(moved, warn=no_warning).step == 2


def test_find_uses_no_other_checkpoint_than_the_one_named(tmp_path: Path) -> None:
    for step in (1, 2):
        path = checkpoint.save(tmp_path, make_state(step), keep=5)
    (path / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"step-00000002: state\.json cannot be read"):
        checkpoint.find(path, warn=no_warning)
    for wrong in (tmp_path / "absent", path / WEIGHTS):
        with pytest.raises(CheckpointError, match="no folder") as error:
            checkpoint.find(wrong, warn=no_warning)
        one_line(error)


def test_misfit_moments_are_not_saved(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, make_state(1), keep=1)
    for key in ("m.wte", "v.wte"):
        state = make_state(2)
        del state.moments[key]
        with pytest.raises(CheckpointError, match=f"moment {key} has shape None"):
            checkpoint.save(tmp_path, state, keep=1)
    assert names(tmp_path) == ["step-00000001"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, make_state(5, 1.0), keep=2)
    checkpoint.save(tmp_path, make_state(6, 2.0), keep=2)
    again = make_state(6, 3.0)
    again.weights["wte"] = again.weights["wte"] + 1
    checkpoint.save(tmp_path, again, keep=2)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]
    assert_same(checkpoint.newest(tmp_path, no_warning), again)


def test_saving_a_step_again_replaces_a_damaged_one(tmp_path: Path) -> None:
    for step in (1, 2):
        path = checkpoint.save(tmp_path, make_state(step), keep=2)
    truncate(path / WEIGHTS)
    checkpoint.save(tmp_path, make_state(2), keep=2)
    assert_same(checkpoint.newest(tmp_path, no_warning), make_state(2))


def test_a_run_that_goes_back_discards_its_former_future(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, make_state(step), keep=9)
    checkpoint.save(tmp_path, make_state(2), keep=1)  # never deletes later ones by itself
    assert checkpoint.saved_steps(tmp_path) == [4, 3, 2]
    removed = checkpoint.discard_after(tmp_path, 2)
    assert [path.name for path in removed] == ["step-00000004", "step-00000003"]
    assert names(tmp_path) == ["step-00000002"]
    assert checkpoint.discard_after(tmp_path, 2) == []
    assert checkpoint.discard_after(tmp_path / "absent", 2) == []
