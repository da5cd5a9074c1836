"""Small runs for the tests of whole runs."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_microgpt.checkpoint import State, checkpoint_name, load
from gpu_microgpt.config import Config
from gpu_microgpt.event_files import event_files, read_events
from gpu_microgpt.trainer import Trainer

ROOT = Path(__file__).parents[1]
LETTERS = "abcdefgh"
MEASURED = {  # differ from run to run
    "tokens_per_second", "ms_per_step", "gflops", "tflops", "share_of_peak", "memory_mb",
}  # fmt: skip
PER_SESSION = ("config", "_hparams_")  # written anew by every session
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 8, "init_std": 0.1},
    "data": {"source": "text.txt", "mode": "documents"},
    "train": {
        "steps": 12,
        "batch_size": 4,
        "eval_interval": 4,
        "log_interval": 2,
        "sample_interval": 6,
        "histogram_interval": 4,
    },
    "optimizer": {"lr": 0.01},
    "schedule": {"name": "cosine", "warmup_fraction": 0.25},
    "checkpoint": {"interval": 5, "keep": 3},
    "sample": {"num": 2, "max_tokens": 12},
}
QUIET = [f"train.{kind}_interval=0" for kind in ("eval", "sample", "histogram")]


def words(count: int = 80, seed: int = 1) -> list[str]:
    """Made-up words of 1 to 9 of eight letters."""
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=draw.randint(1, 9))) for _ in range(count)]


def write_text(folder: Path, count: int = 80, seed: int = 1) -> Path:
    """A corpus of words, one a line."""
    path = folder / "text.txt"
    path.write_text("\n".join(words(count, seed)) + "\n", encoding="utf-8")
    return path


def settings(folder: Path, *overrides: str) -> Config:
    """A tiny run in folder/runs/run on folder/text.txt, which is made if it is not there."""
    path = folder / "text.txt"
    if not path.exists():
        write_text(folder)
    placed = [f"data.source={path}", f"run.dir={folder / 'runs'}"]
    return Config.from_dict(SETTINGS, [*placed, *overrides])


def settings_file(folder: Path, *overrides: str) -> str:
    """The same as a file, for the command line."""
    path = folder / "tiny.yaml"
    path.write_text(settings(folder, *overrides).to_yaml(), encoding="utf-8")
    return str(path)


def train(folder: Path, *overrides: str) -> Path:
    """Train to the end, or to train.stop_at; return the run's folder."""
    config = settings(folder, *overrides)
    assert Trainer(config).run() == 0
    return config.run.path


def share_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the threads, however small it is."""
    for name in ("SHARD_FLOPS", "SHARE_FLOPS"):
        monkeypatch.setattr(f"gpu_microgpt.backend.numpy.{name}", 1e-9)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / checkpoint_name(step)


def saved(run: Path) -> list[int]:
    """Steps of the checkpoints."""
    return sorted(int(path.name.split("-")[1]) for path in (run / "checkpoints").iterdir())


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the machine's speed."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(li).items() if k not in MEASURED} for li in lines]


def events(run: Path) -> list[tuple[str, int]]:
    """(tag, step) of all TensorBoard points, sorted; twice where it is twice."""
    values = [
        (value.tag, event.step)
        for path in event_files(run)
        for event in read_events(path)
        for value in event.summary.value
    ]
    return sorted(v for v in values if not v[0].startswith(PER_SESSION))


def text_event(run: Path, tag: str) -> str:
    """The last text recorded under a tag."""
    values = [
        value.tensor.string_val[0].decode()
        for path in event_files(run)
        for event in read_events(path)
        for value in event.summary.value
        if value.tag == tag
    ]
    return values[-1]


def assert_same_run(run: Path, wanted: Path, step: int) -> None:
    """Both have the same bits at `step` and at all other steps they saved, and the same story."""
    common = set(saved(run)) & set(saved(wanted))
    assert step in common
    for each in common:
        ours, theirs = (load(checkpoint(folder, each)) for folder in (run, wanted))
        assert_same_bits(ours, theirs)
        assert ours.meta | {"config": ""} == theirs.meta | {"config": ""}, each
    assert rows(run) == rows(wanted)
    assert events(run) == events(wanted)
    assert len(set(events(run))) == len(events(run))
    samples = [{p.name: p.read_text() for p in (r / "samples").glob("*")} for r in (run, wanted)]
    assert samples[0] == samples[1]


def assert_same_bits(ours: State, theirs: State) -> None:
    assert ours.step == theirs.step
    for got, wanted in ((ours.weights, theirs.weights), (ours.moments, theirs.moments)):
        assert got.keys() == wanted.keys()
        for name, array in wanted.items():
            assert got[name].dtype == array.dtype
            assert got[name].tobytes() == array.tobytes(), name


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, but for the lock of the program at work there."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def no_warning(line: str) -> None:
    raise AssertionError(f"unexpected warning: {line}")


class Trap(io.StringIO):
    """Standard output that does something when a text is printed on it for the first time."""

    def __init__(self, text: str, action: Callable[[], None]) -> None:
        super().__init__()
        self.text, self.action, self.sprung = text, action, False

    def write(self, text: str) -> int:
        count = super().write(text)
        if self.text in text and not self.sprung:
            self.sprung = True
            self.action()
        return count


def start_training(folder: Path, file: str, *overrides: str) -> subprocess.Popen[str]:
    """`python scripts/train.py` in `folder`, its output through a pipe that holds one page.

    So a run that logs every step waits for its reader, and cannot be over before it is stopped.
    """
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), file, *overrides],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pipesize=4096,
    )


def environment() -> dict[str, str]:
    """This one, with the package of this folder, and `python` being this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """The output up to the line that holds `text`."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}\n{process.communicate()[1]}")
