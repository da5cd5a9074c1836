"""Measures the training step, and the same model in PyTorch beside it.

Every measurement runs in a process of its own, ours and the peer's in turn (thread pools of one
must not spin under the other), several rounds; medians are given, and the median of the rounds'
ratios. Batches are made beforehand and not timed, for both.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Backend, choose
from .bench_setting import BATCHES, WARM_UP, Setting, timed
from .bench_torch import measure_torch
from .errors import UserError
from .model import GPT
from .params import Weights
from .profile import Profiler
from .step import Step
from .version import __version__


def measure_ours(setting: Setting, seconds: float) -> dict[str, Any]:
    """Time our step; {"ms": median, "loss": of the first step, "ops": {name: share}, ...}."""
    backend = choose(setting.config)
    model = GPT(Weights(setting.dims, backend))
    model.params.load(setting.weights, backend)
    step = Step.build(model, setting.config, backend)
    with backend:
        rate = setting.config.optimizer.lr

        def run(number: int) -> None:
            step.train([setting.batches[number % BATCHES]], rate, number + 1)

        run(0)
        loss = float(step.records[1 % len(step.records)][0])
        times = timed(run, seconds)
        shares = _op_shares(step, run, len(times))
        peak = _sgemm_peak(backend)
        return {"ms": 1e3 * statistics.median(times), "steps": len(times), "loss": loss,
                "ops": shares, "peak_gflops": peak, "engine": backend.describe()}  # fmt: skip


def _op_shares(step: Step, run: Callable[[int], None], done: int) -> dict[str, float]:
    """Share of the operations' time that each takes, largest first, over some further steps."""
    count = 1 + max(5, min(200, done // 4))  # the first is not counted
    profiler = Profiler(count)
    profiler.watch(shard.memory for shard in step.shards.shards)
    for number in range(done + WARM_UP + 1, done + WARM_UP + 1 + count):
        with profiler.step(number):
            run(number)
    return {row.name: row.share for row in profiler.rows()}


def _sgemm_peak(backend: Backend) -> float:
    """GFLOP/s of a 2048^3 product in the run's dtype, one shard a thread as in training."""
    size, repeats = 2048, 3
    rng = np.random.default_rng(0)
    a = rng.standard_normal((size, size)).astype(backend.dtype)

    def multiply() -> None:
        out = np.empty_like(a)
        for _ in range(repeats):
            np.matmul(a, a, out=out)

    multiply()
    start = time.perf_counter()
    backend.run([multiply] * backend.threads)
    return 2 * size**3 * repeats * backend.threads / (time.perf_counter() - start) / 1e9


def bench(
    cases: Sequence[str], against: Sequence[str], rounds: int, seconds: float, out: Path | None
) -> str:
    """Measure the cases and return the report in Markdown; also written to `out` with the JSON."""
    for unknown in set(against) - {"torch"}:
        raise UserError(f"{unknown}: no such peer; wanted torch")
    results = []
    for case in cases:
        setting = Setting(case)
        runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for _ in range(rounds):
            for engine in ("ours", *against):
                runs[engine].append(_in_process(case, engine, seconds))
        results.append(_summary(case, setting, runs))
        print(_row(results[-1]), file=sys.stderr)
    report = {"machine": _machine(), "results": results}
    text = _markdown(report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "cpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (out / "cpu.md").write_text(text, encoding="utf-8")
    return text


def _in_process(case: str, engine: str, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "gpu_microgpt.bench", case, engine, str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{case}: measuring {engine} failed: {last}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _summary(case: str, setting: Setting, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds; ratios round by round."""
    ours = runs.pop("ours")
    ms = statistics.median(run["ms"] for run in ours)
    peers = {}
    for engine, theirs in runs.items():
        gap = abs(theirs[0]["loss"] - ours[0]["loss"])
        if gap > 1e-4 * abs(ours[0]["loss"]):
            raise UserError(f"{case}: {engine} computes another loss, off by {gap:.2g}: no race")
        ratios = [b["ms"] / a["ms"] for a, b in zip(ours, theirs, strict=True)]
        peers[engine] = {
            "ms": statistics.median(run["ms"] for run in theirs),
            "ratio": statistics.median(ratios),
            "engine": theirs[0]["engine"],
        }
    gflops = setting.flops() / ms / 1e6
    return {
        "case": case,
        "params": setting.dims.num_params,
        "corpus": setting.corpus.name,
        "ms": ms,
        "tokens_per_second": setting.rows() / ms * 1e3,
        "gflops": gflops,
        "share_of_peak": gflops / statistics.median(run["peak_gflops"] for run in ours),
        "ops": ours[0]["ops"],
        "engine": ours[0]["engine"],
        "peers": peers,
    }


def _row(r: dict[str, Any]) -> str:
    line = (
        f"| {r['case']} | {r['params']:,} | {r['ms']:.3g} | {r['tokens_per_second']:,.0f} | "
        f"{r['gflops']:.1f} | {r['share_of_peak']:.0%} |"
    )
    return line + "".join(f" {p['ms']:.3g} | {p['ratio']:.2f} |" for p in r["peers"].values())


def _markdown(report: dict[str, Any]) -> str:
    results, machine = report["results"], report["machine"]
    peers = results[0]["peers"]
    head = "| case | parameters | ms/step | tokens/s | GFLOP/s | of sgemm peak |" + "".join(
        f" {name} ms/step | {name} / ours |" for name in peers
    )
    lines = ["# CPU training step", "", *(f"- {k}: {v}" for k, v in machine.items())]
    lines += [
        f"- ours: {results[0]['engine']}",
        *(f"- {n}: {p['engine']}" for n, p in peers.items()),
    ]
    lines += ["", head, "|" + " --- |" * (head.count("|") - 1), *(_row(r) for r in results)]
    lines += ["", "Share of each operation in the step:", ""]
    for r in results:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in r["ops"].items())
        lines.append(f"- {r['case']}: {shares}")
    return "\n".join(lines) + "\n"


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    models = (
        [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    )
    commit = "no commit"
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no clone
        folder = str(Path(__file__).parent)
        command = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "processor": models[0].partition(": ")[2] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "version": f"{__version__} ({commit})",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _child(case: str, engine: str, seconds: float) -> dict[str, Any]:
    setting = Setting(case)
    if engine == "ours":
        return measure_ours(setting, seconds)
    return measure_torch(setting, seconds)


if __name__ == "__main__":
    try:
        print(json.dumps(_child(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
    except UserError as failure:
        sys.exit(str(failure))
