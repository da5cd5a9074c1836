from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpu_microgpt.errors import UserError
from gpu_microgpt.plot import plot_runs, smooth


@pytest.fixture(autouse=True)
def _matplotlib() -> None:
    pytest.importorskip("matplotlib")


def make_run(folder: Path, *, train: bool = True, val: bool = True, steps: int = 300) -> Path:
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            row: dict[str, float | None] = {"step": step, "lr": 1e-3}
            if train:
                row["loss/train"] = None if step == 7 else 1.5 + 2 / step  # a NaN loss is null
            if val and step % 50 == 0:
                row["loss/val"] = 1.7
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 301, "loss/tr')  # a line being written
    return folder


def colours(picture: Path) -> set[tuple[int, int, int]]:
    return {colour for _, colour in Image.open(picture).convert("RGB").getcolors(1 << 20)}


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # the first two colours of matplotlib's cycle


def test_one_and_several_runs(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    plot_runs([one], tmp_path / "out" / "one.png")
    plot_runs([one, two / "metrics.jsonl"], tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").size == (1350, 825)
    assert BLUE in colours(tmp_path / "out" / "one.png")
    assert ORANGE not in colours(tmp_path / "out" / "one.png")
    assert {BLUE, ORANGE} <= colours(tmp_path / "two.png")


def test_runs_of_one_name_and_with_one_curve(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a" / "run", val=False)
    two = make_run(tmp_path / "b" / "run", train=False)
    plot_runs([one, two], tmp_path / "out.png")
    assert {BLUE, ORANGE} <= colours(tmp_path / "out.png")


def test_a_single_point_is_drawn(tmp_path: Path) -> None:
    plot_runs([make_run(tmp_path / "run", val=False, steps=1)], tmp_path / "out.png")
    assert BLUE in colours(tmp_path / "out.png")


def test_the_running_mean() -> None:
    np.testing.assert_allclose(smooth(np.full(500, 3.0)), 3.0)
    line = np.arange(500.0)
    np.testing.assert_allclose(smooth(line)[5:-5], line[5:-5])  # centred: it does not lag
    np.testing.assert_allclose(smooth(line)[0], line[:6].mean())
    np.testing.assert_array_equal(smooth(np.array([1.0, 5.0])), [1.0, 5.0])


def test_errors_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"cannot read .*gone.metrics\.jsonl"):
        plot_runs([tmp_path / "gone"], tmp_path / "out.png")
    with pytest.raises(UserError, match="no loss/train and no loss/val"):
        plot_runs([make_run(tmp_path / "new", train=False, val=False)], tmp_path / "out.png")
    with pytest.raises(UserError, match=r"got the ending '\.doc', wanted \.png"):
        plot_runs([run], tmp_path / "out.doc")
    with pytest.raises(UserError, match="cannot write"):
        plot_runs([run], run / "metrics.jsonl" / "out.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install "gpu_microgpt\[plot\]"'):
        plot_runs([run], tmp_path / "out.png")
