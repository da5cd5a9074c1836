"""The CPU's benchmark: what is chosen, what figures come to, what is refused; one real round."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import numpy as np
import pytest

from gpu_microgpt import bench as measuring
from gpu_microgpt.backend import choose
from gpu_microgpt.backend.numpy import PIN
from gpu_microgpt.bench_ours import OurTrainee
from gpu_microgpt.bench_report import UNPINNED
from gpu_microgpt.bench_rows import ROWS, chosen_peers, chosen_rows
from gpu_microgpt.bench_setting import BATCHES, Setting, padded, time_training
from gpu_microgpt.cli import main
from gpu_microgpt.config import Config
from gpu_microgpt.errors import BackendError, UserError
from tests.bench_cases import ran, tiny


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting(tiny(tmp_path))


def test_rows_and_peers_are_chosen():
    assert chosen_rows([]) == list(ROWS)
    assert chosen_rows(["start", "memory", "start"]) == ["start", "memory"]
    assert chosen_peers(["torch", "jax", "jax-scan"]) == ["torch", "jax", "jax-scan"]
    with pytest.raises(UserError, match="names-d17: no such row; wanted one of names-d16"):
        chosen_rows(["names-d17"])
    with pytest.raises(UserError, match="flux: no such peer; wanted one of torch"):
        chosen_peers(["flux"])


def test_every_row_can_be_made_ready():
    for row in ROWS.values():
        config = Config.load(row.config, row.overrides())
        assert config.threads == row.threads
        assert config.train.log_interval == row.together or row.kind != "train"
        assert (config.dtype == "bf16") == row.narrow
    assert [name for name in ROWS if name.endswith("-bf16")]


def test_a_scan_is_for_short_steps_only():
    scanned = {name for name, row in ROWS.items() if row.measures("jax-scan")}
    assert scanned == {"time-to-loss", *(name for name in ROWS if name.startswith("names-"))}
    assert all(row.measures("ours") for row in ROWS.values())


@pytest.mark.parametrize("peer", ["torch", "jax"])
def test_a_peer_that_is_not_installed(peer, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "find_spec", lambda name: None)
    assert main(["bench", "--rows", "names-d16", "--against", peer]) == 2
    told = capsys.readouterr().err
    assert told == f"error: {peer} is not installed: pip install -e '.[bench]'\n"


def test_mistakes_on_the_command_line(capsys):
    assert main(["bench", "--against", "flux"]) == 2
    assert main(["bench", "--rows", "d16"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "error: flux: no such peer", "error: d16: no such row",
    ]  # fmt: skip


def test_our_step_is_the_engines(setting):
    backend = choose(setting.config)
    with backend:
        whole, parts = (OurTrainee(setting, backend) for _ in range(2))
        losses = whole.steps(1, 8)
        assert np.array_equal(losses, np.concatenate([parts.steps(1, 3), parts.steps(4, 5)]))
    assert np.log(setting.dims.vocab_size) == pytest.approx(losses[0], rel=0.1)
    assert len(set(losses.tolist())) == 8
    assert len(setting.batches) == BATCHES


def test_a_real_measurement(setting):
    backend = choose(setting.config)
    with backend:
        found = time_training(OurTrainee(setting, backend), 8, 0.05)
    assert found["steps"] % 8 == 0
    assert found["steps"] >= 24
    assert 0 < found["ms"] < 1e3
    assert 0 < found["cores"] < 64
    assert found["losses"] == OurTrainee(setting, backend).steps(1, 4).tolist()


class Clocked:
    """A trainee whose steps take 0.25 s by a clock of its own, but for some slow ones."""

    name, positions = "clocked", 7.0

    def __init__(self) -> None:
        self.now, self.done = 0.0, 0

    def steps(self, first: int, count: int) -> Any:
        assert first == self.done + 1
        self.done += count
        self.now += count * (0.25 if self.done > 8 else 100.0)  # the first two looks warm up
        return np.arange(first, first + count) / 8


def test_time_is_of_a_step_and_without_the_warm_up(monkeypatch):
    clocked = Clocked()
    monkeypatch.setattr("gpu_microgpt.bench_setting.time.perf_counter", lambda: clocked.now)
    found = time_training(clocked, 4, 5.0)
    assert found["ms"] == 250
    assert found["steps"] == 20  # 5 s
    assert clocked.done == 28
    assert found["losses"] == [0.125, 0.25, 0.375, 0.5]
    assert (found["engine"], found["positions"]) == ("clocked", 7.0)


def test_padding_leaves_the_batch_as_it_was(setting):
    batch = setting.batches[0]
    for block_size in (0, 16):
        tokens, targets = padded(batch, block_size)
        assert tokens.shape == targets.shape == (4, block_size or batch.layout.longest)
        assert np.array_equal(tokens[targets >= 0], batch.tokens)
        assert np.array_equal(targets[targets >= 0], batch.targets)


def test_one_round_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ROWS, "tiny", tiny(tmp_path))
    monkeypatch.delenv(PIN, raising=False)
    monkeypatch.setattr(measuring, "_child", done_here)
    assert main(["bench", "--rows", "tiny", "--rounds", "2", "--seconds", "0",
                 "--out", str(tmp_path / "out")]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "cpu.md").read_text("utf-8") == printed
    report = json.loads((tmp_path / "out" / "cpu.json").read_text("utf-8"))
    (result,) = report["results"]
    assert len(result["values"]) == 2
    assert result["value"] > 0
    assert result["corpus"].endswith("text.txt")
    assert {"linear", "attention", "adamw"} <= set(result["ops"])
    assert sum(result["ops"].values()) == pytest.approx(1)
    assert 0 < result["share_of_peak"] < 1


def test_a_measurement_in_a_process_of_its_own():
    """As in a session, but that it fails: the line it ends with is what is told."""
    job = {"row": "names-d17", "engine": "ours", "seconds": 0, "shares": False}
    done = measuring._child(job, dict(os.environ))
    assert done.returncode
    assert "names-d17" in done.stderr.splitlines()[-1]


def failing(job: Any, environment: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no compiler\n")


def test_a_peer_that_fails_is_left_out_and_ours_is_not(tmp_path, monkeypatch):
    monkeypatch.setitem(ROWS, "tiny", tiny(tmp_path))
    monkeypatch.setattr(measuring, "_child", failing)
    refused = {"refused": "RuntimeError: no compiler"}
    assert measuring._measured("tiny", "torch", 0, False, []) == refused
    monkeypatch.setattr(measuring, "_child", None)  # not tried again
    assert measuring._measured("tiny", "torch", 0, False, [refused]) == refused
    monkeypatch.setattr(measuring, "_child", failing)
    with pytest.raises(UserError, match="tiny: measuring ours failed: RuntimeError: no compiler"):
        measuring._measured("tiny", "ours", 0, False, [])


def test_what_the_backend_refuses_is_no_failure(tmp_path, monkeypatch):
    def choose_none(config: Config) -> None:
        raise BackendError("dtype: got bf16, this CPU has no AVX512_BF16")

    monkeypatch.setitem(ROWS, "tiny", tiny(tmp_path))
    monkeypatch.setattr("gpu_microgpt.bench_ours.choose", choose_none)
    job = {"row": "tiny", "engine": "ours", "seconds": 0, "shares": False}
    assert measuring.measure(job) == {"refused": "dtype: got bf16, this CPU has no AVX512_BF16"}


def test_environments(monkeypatch):
    monkeypatch.setenv(PIN, "Haswell")
    one, all_cores = ROWS["names-d16"], ROWS["shakespeare"]
    assert measuring._environment(one, "jax-scan")["NPROC"] == "1"
    assert "NPROC" not in measuring._environment(all_cores, "jax")
    assert "NPROC" not in measuring._environment(one, "ours")
    assert measuring._environment(one, "ours")[PIN] == "Haswell"
    assert PIN not in measuring._environment(one, UNPINNED)


def test_where_blas_is_pinned_ours_is_also_measured_without(tmp_path, monkeypatch):
    engines = []

    def measured(name: str, engine: str, *_: Any) -> dict[str, Any]:
        engines.append(engine)
        return ran(1.0)

    monkeypatch.setitem(ROWS, "tiny", tiny(tmp_path))
    monkeypatch.setattr(measuring, "_measured", measured)
    monkeypatch.setattr(measuring, "find_spec", lambda name: name)
    monkeypatch.setenv(PIN, "Haswell")
    text = measuring.bench(["tiny"], ["torch"], 2, 0, None)
    assert engines == ["ours", UNPINNED, "torch"] * 2
    assert f"- {PIN}: Haswell" in text.splitlines()
    assert f"## Without {PIN}" in text
    monkeypatch.delenv(PIN)
    assert f"## Without {PIN}" not in measuring.bench(["tiny"], ["torch"], 1, 0, None)


def done_here(job: Any, environment: Any) -> subprocess.CompletedProcess[str]:
    """A measurement without a process: a new one would not know the row."""
    return subprocess.CompletedProcess([], 0, json.dumps(measuring.measure(job)), "")
