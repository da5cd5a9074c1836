"""The CPU's benchmark: what is chosen, what figures come to, what is refused; one real round."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_microgpt import bench as measuring
from gpu_microgpt import bench_runs
from gpu_microgpt.backend import choose
from gpu_microgpt.bench_ours import OurTrainee
from gpu_microgpt.bench_report import PIN, UNPINNED, markdown, summary, told
from gpu_microgpt.bench_rows import LOSS, MEAN, ROWS, Row, chosen_peers, chosen_rows
from gpu_microgpt.bench_setting import BATCHES, Setting, padded, time_training
from gpu_microgpt.cli import main
from gpu_microgpt.config import Config
from gpu_microgpt.errors import BackendError, UserError
from tests.run_helpers import write_text

TINY = ("model.n_embd=8", "model.n_head=2", "train.batch_size=4", "kernels=reference")


def tiny(folder: Path, **others: Any) -> Row:
    """A row small enough for a test, on made-up words."""
    differs = (*TINY, f"data.source={write_text(folder)}", *others.pop("differs", ()))
    given = {"kind": "train", "unit": "us/sample", "threads": 1, "together": 8, **others}
    return Row(title="tiny", config="names", differs=differs, **given)


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


def ran(ms: float, **more: Any) -> dict[str, Any]:
    """One measurement of a step."""
    found = {"ms": ms, "losses": [3.0, 2.9], "positions": 28.0, "cores": 1.0, "engine": "it"}
    return {**found, "sgemm_gflops": 100.0, **more}


def test_medians_and_ratios(setting):
    runs = {
        "ours": [ran(1.0, ops={"linear": 0.75, "adamw": 0.25}), ran(4.0), ran(2.0)],
        UNPINNED: [ran(1.0, sgemm_gflops=400.0)] * 3,
        "torch": [ran(10.0), ran(8.0), ran(30.0)],
        "jax": [ran(1.0), {"refused": "no such processor"}, ran(1.0)],
    }
    result = summary("tiny", setting.row, setting, runs)
    assert result["value"] == 500  # 2 ms for 4 samples
    assert result["peers"]["torch"]["value"] == 2500
    assert result["peers"]["torch"]["ratio"] == 10  # of 10, 2, 15, not 10 / 2
    assert result["peers"]["jax"] == {"refused": "no such processor"}
    assert result["gflops"] == pytest.approx(setting.flops() / 2e-3 / 1e9)
    assert result["share_of_peak"] == pytest.approx(result["gflops"] / 100)
    assert result[UNPINNED]["share_of_peak"] == pytest.approx(result["gflops"] * 2 / 400)
    assert result["ops"] == {"linear": 0.75, "adamw": 0.25}


def test_more_tokens_a_second_are_better(setting):
    row = Row("generate", "writing", "names", unit="tokens/s")

    def wrote(speed: float) -> dict[str, Any]:
        return {"tokens_per_second": speed, "tokens": [1, 2], "sgemm_gflops": 1.0, "engine": "it"}

    result = summary("w", row, setting, {"ours": [wrote(300.0)], "torch": [wrote(100.0)]})
    assert (result["value"], result["peers"]["torch"]["ratio"]) == (300, 3)
    other = wrote(100.0) | {"tokens": [1, 3]}
    with pytest.raises(UserError, match=r"w: torch writes another text, .*: no race"):
        summary("w", row, setting, {"ours": [wrote(300.0)], "torch": [other]})


@pytest.mark.parametrize(("narrow", "gap"), [(False, 1e-3), (True, 3e-2)])
def test_engines_have_to_compute_the_same(setting, narrow, gap):
    row = tiny(setting.corpus.path.parent, differs=("dtype=bf16",) if narrow else ())
    near = [3.0, 2.9 * (1 + gap / 20)]
    summary("tiny", row, setting, {"ours": [ran(1)], "torch": [ran(1, losses=near)]})
    for losses in ([3.0, 2.9 * (1 + gap)], [float("nan"), 2.9]):
        runs = {"ours": [ran(1)], "torch": [ran(1, losses=losses)]}
        with pytest.raises(UserError, match=r"tiny: torch computes another loss at step \d, .* no"):
            summary("tiny", row, setting, runs)


def test_what_this_cpu_cannot_do_is_said_and_peers_are_shown(setting):
    runs = {"ours": [{"refused": "no AVX512_BF16"}], "torch": [ran(8.0)]}
    result = summary("tiny", setting.row, setting, runs)
    assert result["refused"] == "no AVX512_BF16"
    text = markdown({"machine": {}, "rounds": 1, "results": [result]})
    assert "- tiny: not on this CPU: no AVX512_BF16" in text
    assert cells(text, "tiny (`tiny`)")[2:] == ["no, see below", "2,000", ""]


def cells(text: str, first: str) -> list[str]:
    """Of the table's line that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page(setting):
    runs = {
        "ours": [ran(2.0, ops={"linear": 0.75, "adamw": 0.25})],
        UNPINNED: [ran(1.0, sgemm_gflops=400.0)],
        "torch": [ran(10.0, positions=40.0)],
        "jax": [{"refused": "no such processor"}],
    }
    results = [summary("tiny", setting.row, setting, runs)]
    whole = Row("compile", "compiling", "names", unit="s")
    took = {"seconds": 31.4, "again": 3.1, "runs": 2}
    results.append(summary("first", whole, setting, {"ours": [took]}))
    ends = {"seconds": 1.5, "loss": 1.98768, "steps": 3000}
    results.append(summary("loss", Row("loss", "to", "names", unit="s"), setting, {"ours": [ends]}))
    text = markdown({"machine": {"cores": 2}, "rounds": 3, "results": results})
    params = f"{setting.dims.num_params:,}"
    assert cells(text, "tiny (`tiny`)")[1:] == [params, "500", "2,500", "5.00", "no, see below", ""]
    assert cells(text, "compiling (`first`)")[1:] == [params, "31.4"]
    assert cells(text, "tiny")[3:] == ["100", f"{results[0]['share_of_peak']:.0%}", "1.00",
                                      "ours 28, torch 40"]  # fmt: skip
    for line in (
        "- cores: 2",
        "- rounds: 3",
        "- tiny: jax failed: no such processor",
        "- first: 2 whole runs; the same again, kernels compiled: 3.1 s",
        f"- loss: ours ends at 1.9877, mean of the last {MEAN} of 3,000 steps",
        "- tiny: linear 75%, adamw 25%",
        f"## Without {PIN}",
        "| tiny | us/sample | 500 | 250 | 100 | 400 |",
    ):
        assert line in text.splitlines()
    assert len([line for line in text.splitlines() if line.startswith("## ")]) == 5


def test_losses_of_a_run_are_read_and_judged():
    records = [{"step": 1, "loss/train": 3.0}, {"step": 1, "loss/val": 9.0}]
    records += [{"step": s, "loss/train": LOSS - 0.25} for s in range(2, MEAN + 2)]
    losses = bench_runs.losses_of(records)
    assert len(losses) == MEAN + 1
    assert bench_runs.mean_of_last(losses) == LOSS - 0.25
    with pytest.raises(UserError, match=f"mean loss of the last {MEAN} of 100 steps is 2.0000"):
        bench_runs.mean_of_last([LOSS] * MEAN)
    with pytest.raises(UserError, match="of 99 steps"):
        bench_runs.mean_of_last([LOSS - 1] * (MEAN - 1))


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


def test_what_is_told_on_the_way(setting):
    assert told(setting.row, setting, ran(2.0)) == "500 us/sample"
    assert told(setting.row, setting, {"refused": "no"}) == "not measured: no"


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
