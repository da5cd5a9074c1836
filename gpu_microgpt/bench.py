"""Measures training, writing text and whole runs on the CPU, PyTorch and JAX beside it.

Every measurement runs in a process of its own, ours and the peers' in turn (thread pools of one
must not spin under the other), several rounds; medians are given, and the medians of the rounds'
ratios. Ours makes its batches while it is timed; peers have theirs ready beforehand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import bench_runs
from .backend.numpy import PIN
from .bench_jax import ONE_THREAD, JaxTrainee
from .bench_ours import measure_training, measure_writing, timed
from .bench_report import UNPINNED, machine, markdown, summary, told
from .bench_rows import ROWS, SCAN, Row, chosen_peers, chosen_rows
from .bench_setting import Setting, Trainee, time_training
from .bench_torch_cpu import TorchTrainee
from .bench_torch_cpu import measure_writing as measure_torch_writing
from .errors import BackendError, UserError

PROMPT = "\n"  # what a text goes on from


def bench(
    rows: Sequence[str], against: Sequence[str], rounds: int, seconds: float, out: Path | None
) -> str:
    """Measure these rows (none: all) beside these peers, and return the report in Markdown, which
    is also written to `out` with the JSON, row by row. Raises UserError."""
    names, peers = chosen_rows(rows), chosen_peers(against)
    for package in {peer.partition("-")[0] for peer in peers}:
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install -e '.[bench]'")
    pinned = [UNPINNED] if os.environ.get(PIN) else []
    report: dict[str, Any] = {"machine": machine(), "rounds": rounds, "results": []}
    for name in names:
        row = ROWS[name]
        fast = [*pinned, *peers] if row.kind in ("train", "generate") else peers
        engines = ["ours", *(peer for peer in fast if peer == UNPINNED or row.measures(peer))]
        runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        setting = Setting(row)
        for number in range(1 if row.kind == "compile" else rounds):
            for engine in engines:
                found = _measured(name, engine, seconds, number == 0, runs[engine])
                runs[engine].append(found)
                print(f"{name}: {engine} {told(row, setting, found)}", file=sys.stderr)
        report["results"].append(summary(name, row, setting, runs))
        _write(report, out)
    return markdown(report)


def _measured(
    name: str, engine: str, seconds: float, shares: bool, before: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One measurement; what could not be done is not tried again. Raises UserError where ours
    fails."""
    if before and "refused" in before[0]:
        return dict(before[0])
    job = {"row": name, "engine": engine, "seconds": seconds, "shares": shares}
    done = _child(job, _environment(ROWS[name], engine))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        if engine in ("ours", UNPINNED):
            raise UserError(f"{name}: measuring {engine} failed: {last}")
        return {"refused": last}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(job: Mapping[str, Any], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(job), capture_output=True, text=True, env=environment)


def _command(job: Mapping[str, Any]) -> list[str]:
    return [sys.executable, "-m", "gpu_microgpt.bench", json.dumps(job)]


def _environment(row: Row, engine: str) -> dict[str, str]:
    """Of a measurement's process."""
    more = ONE_THREAD if engine.startswith("jax") and row.threads == 1 else {}
    without = {PIN} if engine == UNPINNED else set()
    return {name: x for name, x in {**os.environ, **more}.items() if name not in without}


def _write(report: Mapping[str, Any], out: Path | None) -> None:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "cpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (out / "cpu.md").write_text(markdown(report), encoding="utf-8")


# in the process of one measurement


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job: {"row", "engine", "seconds", "shares"}, and "inside" where a peer is in a process
    whose whole time counts. {"refused": why} for what this CPU cannot do. Raises UserError."""
    row, engine, seconds = ROWS[job["row"]], job["engine"], job["seconds"]
    ours = engine in ("ours", UNPINNED)
    if not ours and row.kind not in ("train", "generate") and "inside" not in job:
        return bench_runs.measure_peer(row, _command({**job, "inside": True}))
    setting = Setting(row)
    if ours:
        try:
            return _measure_ours(setting, seconds, job["shares"])
        except BackendError as refusal:
            return {"refused": str(refusal)}
    if row.kind == "generate":
        first = int(setting.dataset.tokenizer.encode(PROMPT)[-1])
        return measure_torch_writing(setting, first, _length(setting), seconds, timed)
    trainee = _peer(setting, engine)
    if row.kind == "train":
        return time_training(trainee, row.together, seconds)
    return bench_runs.peer_process(trainee, setting)


def _measure_ours(setting: Setting, seconds: float, shares: bool) -> dict[str, Any]:
    """Whatever the row is of."""
    if setting.row.kind == "train":
        return measure_training(setting, seconds, shares)
    if setting.row.kind == "generate":
        return measure_writing(setting, PROMPT, _length(setting), seconds)
    of_runs = {
        "loss": bench_runs.measure_time_to_loss,
        "start": bench_runs.measure_start,
        "compile": bench_runs.measure_compiling,
        "memory": bench_runs.measure_memory,
    }
    return of_runs[setting.row.kind](setting)


def _peer(setting: Setting, engine: str) -> Trainee:
    package, _, form = engine.partition("-")
    if package == "torch":
        small = setting.row.together == SCAN
        return TorchTrainee(setting, form == "compile", whole=form == "compile" and small)
    return JaxTrainee(setting, scan=form == "scan")


def _length(setting: Setting) -> int:
    """Tokens that fit into the context behind PROMPT."""
    return setting.dims.block_size - 1


if __name__ == "__main__":
    try:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    except UserError as failure:
        sys.exit(str(failure))
