"""Figures of whole processes: how soon a run begins, how long it takes to a loss, what compiling
costs, how much memory it needs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .backend import choose
from .bench_rows import LOSS, MEAN, Row
from .bench_setting import Setting, Trainee, train_to_end
from .config import Config
from .data.corpus import FOLDER_VARIABLE
from .errors import BackendError, UserError
from .metrics import FILE_NAME

TRAIN = [sys.executable, "-c", "from gpu_microgpt.cli import entry; entry()", "train"]
MEMORY_STEPS = 12
# runs that come by every kernel: documents and running text, clipping, evaluation, samples
SMALL = ("train.steps=2", "train.batch_size=4", "train.eval_batches=1", "sample.max_tokens=4")
COMPILING: tuple[tuple[str, ...], ...] = (
    ("names", *SMALL),
    ("shakespeare", *SMALL, "model.n_embd=32", "model.block_size=16"),
)


@dataclass(frozen=True)
class Ended:
    """A process that went well."""

    began: float  # seconds since the epoch
    seconds: float
    megabytes: float  # resident, at most (but not below ours); 0: the system does not say
    output: str
    records: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl
    first_record: float = 0.0  # when it was written last, seconds since the epoch


def run(command: Sequence[str], more: Mapping[str, str] | None = None) -> Ended:
    """Run to the end, with these environment variables beside ours. Raises UserError with its last
    line where it fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began, start = time.time(), time.perf_counter()
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env={**os.environ, **(more or {})}
        )
        megabytes = 0.0
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            megabytes = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
        process.wait()
        seconds = time.perf_counter() - start
        out.seek(0), err.seek(0)
        output, errors = out.read(), err.read()
    if process.returncode:
        last = (errors.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"exit code {process.returncode}: {last}")
    return Ended(began, seconds, megabytes, output)


def run_training(arguments: Sequence[str], more: Mapping[str, str] | None = None) -> Ended:
    """`train` with these arguments, in a folder that is then removed."""
    with tempfile.TemporaryDirectory() as folder:
        ended = run([*TRAIN, *arguments, f"run.dir={folder}", "run.name=run"], more)
        path = Path(folder) / "run" / FILE_NAME
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        fields = {**vars(ended), "records": records, "first_record": path.stat().st_mtime}
    return Ended(**fields)


def measure_start(setting: Setting) -> dict[str, Any]:
    """From the start of a run's process until its first step's loss is written."""
    arguments = [*_arguments(setting), "train.log_interval=1", "train.stop_at=1"]
    run_training(arguments)  # now kernels are compiled, files in the system's cache
    ended = run_training(arguments)
    return {"seconds": ended.first_record - ended.began}


def measure_time_to_loss(setting: Setting) -> dict[str, Any]:
    """A whole run's seconds, and the mean loss of its last steps, from the same run before it with
    every loss written: both have to end in the same loss."""
    arguments = [*_arguments(setting), *_quiet()]
    before = run_training([*arguments, "train.log_interval=1"])
    ended = run_training([*arguments, f"train.log_interval={MEAN}"])
    losses, checked = (losses_of(e.records) for e in (ended, before))
    if losses[-1] != checked[-1]:
        raise UserError(f"two runs ended in losses {losses[-1]} and {checked[-1]}: no measure")
    return {"seconds": ended.seconds, "loss": mean_of_last(checked), "steps": len(checked)}


def losses_of(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Training losses in metrics.jsonl, in order."""
    return [record["loss/train"] for record in records if "loss/train" in record]


def mean_of_last(losses: Sequence[float]) -> float:
    """Of the last MEAN. Raises UserError where it is not below LOSS."""
    mean = statistics.fmean(losses[-MEAN:])
    if len(losses) < MEAN or mean >= LOSS:
        raise UserError(f"mean loss of the last {MEAN} of {len(losses)} steps is {mean:.4f}, "
                        f"wanted below {LOSS:g}")  # fmt: skip
    return mean


def measure_compiling(setting: Setting) -> dict[str, Any]:
    """Seconds of runs that come by every kernel, with an empty cache folder and again with what the
    first ones left there. Raises BackendError where nothing is compiled."""
    data = {FOLDER_VARIABLE: str(setting.corpus.path.parent)}
    with tempfile.TemporaryDirectory() as folder:
        place = {**data, "XDG_CACHE_HOME": folder}
        runs = [*COMPILING, *_narrow_runs(setting.config)]
        times = [sum(run_training(r, place).seconds for r in runs) for _ in range(2)]
        if not any(Path(folder).rglob("*.nbc")):
            raise BackendError("no compiled kernels were found in the cache folder")
    return {"seconds": times[0], "again": times[1], "runs": len(runs)}


def _narrow_runs(config: Config) -> list[tuple[str, ...]]:
    """The same in bf16, where this CPU has it."""
    try:
        choose(Config.from_dict(config.to_dict(), ["dtype=bf16"]))
    except BackendError:
        return []
    return [(*arguments, "dtype=bf16") for arguments in COMPILING]


def measure_memory(setting: Setting) -> dict[str, Any]:
    """Largest resident memory of a short run with everything in it: steps, histograms, held-out
    loss, samples, checkpoint."""
    _check_memory_is_told()
    short = (f"train.steps={MEMORY_STEPS}", "train.histogram_interval=6", "train.eval_batches=4")
    return {"megabytes": run_training([*_arguments(setting), *short]).megabytes}


def measure_peer(row: Row, command: Sequence[str]) -> dict[str, Any]:
    """The same of a peer's process, which says in JSON what `peer_process` returns."""
    ended = run(command)
    said: dict[str, Any] = json.loads(ended.output.splitlines()[-1])
    if row.kind == "memory":
        _check_memory_is_told()
        return said | {"megabytes": ended.megabytes}
    return said | {
        "seconds": said["done_at"] - ended.began if row.kind == "start" else ended.seconds
    }


def peer_process(trainee: Trainee, setting: Setting) -> dict[str, Any]:
    """What a peer does in a process of its own: a step, or some, or all to the loss."""
    found: dict[str, Any] = {"engine": trainee.name}
    if setting.row.kind == "loss":
        losses = train_to_end(trainee, setting)
        return found | {"loss": mean_of_last(losses), "steps": len(losses)}
    trainee.steps(1, 1 if setting.row.kind == "start" else MEMORY_STEPS)
    return found | {"done_at": time.time()}


def _check_memory_is_told() -> None:
    """Raise BackendError where it is not."""
    if not hasattr(os, "wait4"):
        raise BackendError("this system does not say how much memory a process took")


def _arguments(setting: Setting) -> list[str]:
    """Of `train`: the config, and what differs."""
    row = setting.row
    return [row.config, "backend=numpy", f"threads={row.threads}", *row.differs]


def _quiet() -> list[str]:
    """Nothing but training, and a checkpoint at the end."""
    intervals = [f"train.{kind}_interval=0" for kind in ("eval", "sample", "histogram")]
    return [*intervals, "checkpoint.interval=0", "sample.num=0"]
