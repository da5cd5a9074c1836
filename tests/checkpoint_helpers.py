"""Shared by the checkpoint tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpu_microgpt.checkpoint import State
from gpu_microgpt.errors import CheckpointError


def make_state(
    step: int, val_loss: float | None = None, dtype: str = "float32", rows: int = 5
) -> State:
    """A state whose every number follows from the arguments."""
    rng = np.random.default_rng(step)
    shapes = {"wte": (rows, 4), "layer0.attn_wo": (4, 4), "scale": (), "none": (0, 3)}
    weights = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    moments = {
        f"{kind}.{name}": rng.random(shape).astype(dtype)
        for kind in "mv"
        for name, shape in shapes.items()
    }
    meta = {
        "val_loss": val_loss,
        "config": {"lr": 0.1 + 0.2, "betas": [0.9, 0.98]},
        "chars": "\né€😀",
    }
    return State(step, weights, moments, meta)


def assert_same(got: State, wanted: State) -> None:
    assert (got.step, got.meta) == (wanted.step, wanted.meta)
    for ours, theirs in ((got.weights, wanted.weights), (got.moments, wanted.moments)):
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert ours[name].dtype == array.dtype
            assert ours[name].shape == array.shape
            assert ours[name].tobytes() == array.tobytes(), name


def no_warning(line: str) -> None:
    raise AssertionError(f"unexpected warning: {line}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_line(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
