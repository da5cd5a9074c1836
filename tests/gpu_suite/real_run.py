"""A training run as a user starts it: how long it takes and what comes of it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu_suite.parts import ROOT
from tests.gpu_suite.results import Results

TOY = (
    "model.n_embd=16", "model.n_layer=1", "model.n_head=4", "model.block_size=8",
    "train.batch_size=2", "train.steps=3", "train.eval_interval=2", "train.eval_batches=1",
    "train.log_interval=1", "sample.max_tokens=4", "data.source=stdlib",
)  # fmt: skip


def real_run(results: Results, name: str, dry_run: bool) -> None:
    """Train by a shipped config into a folder of its own, and read what the run wrote."""
    config = f"configs/{name.replace('-', '_')}.yaml"
    settings = ["backend=cupy", f"run.dir={results.folder}", f"run.name={name}"]
    runner = ["-m", "tests.gpu_suite.places"] if dry_run else []
    command = ["scripts/train.py", config, *settings, *(TOY if dry_run else _text())]
    results.put("command", " ".join(["python", *command[:3]]))
    start, end = time.monotonic(), max(1.0, results.left() - 2)
    try:
        done = subprocess.run(
            [sys.executable, *runner, *command], cwd=ROOT, timeout=end, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        results.put("run", figures(results.folder / name))
        told = results.fail if name == "shakespeare" else results.skip  # others: if time remains
        told(f"not finished within {end:.0f} s")
        return
    results.put("seconds", time.monotonic() - start)
    print(done.stdout)
    for line in done.stdout.splitlines():
        if line.startswith(("backend:", "data:", "WARNING", "step ")) and ": samples" not in line:
            results.add("said", line)
    if done.returncode:
        results.fail(f"exit code {done.returncode}: {done.stdout.strip().splitlines()[-1]}")
    results.put("run", figures(results.folder / name))


def figures(folder: Path) -> dict[str, Any]:
    """Of a run's metrics: last losses, lowest held-out loss, median speed."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    def column(tag: str) -> list[float]:
        return [row[tag] for row in rows if row.get(tag) is not None]

    wanted: dict[str, Any] = {"steps": max(row["step"] for row in rows)}
    for tag, how in (
        ("loss/train", lambda x: statistics.fmean(x[-5:])),
        ("loss/val", min),
        ("ms_per_step", statistics.median),
        ("tokens_per_second", statistics.median),
    ):
        if values := column(tag):
            wanted[tag] = how(values)
    return wanted


def _text() -> list[str]:
    """Nothing is waited for where there is neither the text nor a network."""
    from gpu_microgpt.data.corpus import FOLDER_VARIABLE, cache_folder

    folders = [cache_folder(), *map(Path, filter(None, [os.environ.get(FOLDER_VARIABLE)]))]
    here = any((folder / "shakespeare.txt").exists() for folder in folders)
    return [] if here else ["data.source=stdlib"]
