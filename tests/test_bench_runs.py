"""The benchmark's figures of whole processes, with small runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from gpu_microgpt import bench_runs
from gpu_microgpt.bench_rows import MEAN, Row
from gpu_microgpt.bench_setting import Setting
from gpu_microgpt.errors import UserError
from tests.run_helpers import write_text

SMALL = (
    "model.n_embd=8", "model.n_head=2", "train.batch_size=4", "kernels=reference",
    "data.val_fraction=0.1",
)  # fmt: skip


def setting(folder: Path, kind: str, *more: str) -> Setting:
    differs = (*SMALL, f"data.source={write_text(folder)}", *more)
    return Setting(Row(kind, "small", "names", differs, "s", 1))  # type: ignore[arg-type]


def test_a_process_is_measured(tmp_path):
    mine = 0
    if hasattr(os, "wait4"):
        import resource

        mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = mine + 200_000_000  # a process begins with the peak of the one that starts it
    code = f"import time; b = bytearray({size}); time.sleep(.2); print('done')"
    ended = bench_runs.run([sys.executable, "-c", code])
    assert ended.output == "done\n"
    assert 0.2 < ended.seconds < 20
    if hasattr(os, "wait4"):
        assert size < 1e6 * ended.megabytes < size + 200_000_000
    code = "import os; print(os.environ['HUE'])"
    assert bench_runs.run([sys.executable, "-c", code], {"HUE": "red"}).output == "red\n"
    code = "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"
    with pytest.raises(UserError, match="exit code 3: no such thing"):
        bench_runs.run([sys.executable, "-c", code])


def test_start_is_before_the_end(tmp_path):
    small = setting(tmp_path, "start")
    found = bench_runs.measure_start(small)["seconds"]
    assert 0.05 < found < 60


def test_time_to_a_loss(tmp_path, monkeypatch):
    small = setting(tmp_path, "loss", f"train.steps={MEAN + 20}")
    monkeypatch.setattr(bench_runs, "LOSS", 2.6)
    found = bench_runs.measure_time_to_loss(small)
    assert found["steps"] == MEAN + 20
    assert 0.05 < found["seconds"] < 60
    assert 1 < found["loss"] < 2.6
    monkeypatch.setattr(bench_runs, "LOSS", 1.0)
    with pytest.raises(UserError, match=r"of 120 steps is .*, wanted below 1"):
        bench_runs.measure_time_to_loss(small)


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="this system does not say")
def test_memory(tmp_path):
    found = bench_runs.measure_memory(setting(tmp_path, "memory"))["megabytes"]
    import resource

    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # what it begins with
    assert 30 < found < max(1500, mine + 500)
