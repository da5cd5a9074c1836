"""The parts that measure: the machine's best, whole steps beside PyTorch's, operations, texts."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_microgpt.backend.cuda import CudaBackend
from gpu_microgpt.bench_gpu import (
    CHECKED,
    NotedPlans,
    OurStep,
    burst_length,
    copy_rate,
    product_rate,
    write_rate,
)
from gpu_microgpt.bench_gpu_ops import Operations
from gpu_microgpt.bench_gpu_setting import GpuSetting
from gpu_microgpt.bench_torch import GpuPeers, milliseconds
from gpu_microgpt.errors import DeviceError, UserError
from tests.gpu_suite.places import backend
from tests.gpu_suite.results import Results

MEGABYTE = 1 << 20
TOY = (
    "model.n_embd=16", "model.n_layer=1", "model.n_head=4", "model.block_size=8",
    "train.batch_size=2",
)  # fmt: skip
TOY_VOCAB = {"124m": 1100}  # above what a warp takes alone
ROUNDS = 7  # of bursts, all engines in turn
LOSS_GAP, NORM_GAP = 0.005, 0.03  # shares by which bfloat16 engines may differ
Run = Callable[[int], None]


def ceilings(results: Results, dry_run: bool) -> None:
    """What this machine does at best, with our own copy and our own product."""
    with backend(dry_run) as cuda:
        nbytes, size = (4096, 64) if dry_run else (1 << 30, 8192)
        results.put("copy_bytes", nbytes)
        note(results, "copy_gb_s", partial(copy_rate, cuda.gpu, nbytes))
        results.put("product_size", size)
        note(results, "product_tflops", partial(product_rate, cuda, size))


def note(results: Results, name: str, measure: Callable[[], float]) -> None:
    """What it comes to, or why not: the next measurement goes on."""
    try:
        results.put(name, measure())
    except UserError as failure:
        results.fail(f"{name}: {first_line(failure)}")


def setting_of(case: str, cuda: CudaBackend, dry_run: bool) -> GpuSetting:
    """The case, or a toy of its kind."""
    if not dry_run:
        return GpuSetting(case, cuda)
    return GpuSetting(case, cuda, TOY, TOY_VOCAB.get(case, 0))


def steps(results: Results, case: str, dry_run: bool) -> None:
    """The whole training step: ours alone, then in turn with PyTorch's, if that agrees."""
    with backend(dry_run) as cuda:
        setting = setting_of(case, cuda, dry_run)
        describe(results, setting, dry_run)
        ours = OurStep(setting, cuda)
        ours.milliseconds(2)
        rounds, count = ROUNDS, burst_length(ours.milliseconds(5))
        if dry_run:
            rounds, count = 2, 2
        times = [ours.milliseconds(count) for _ in range(rounds)]
        results.put("ours", ours.figures(times))
        if ours.allocations or ours.growth > MEGABYTE:
            results.fail(
                f"{case}: after the first step {ours.allocations} allocations, memory grew by "
                f"{ours.growth:,} bytes; wanted none"
            )
        if dry_run:
            results.skip("PyTorch is left out of a dry run")
        else:
            beside_torch(results, ours, count)


def describe(results: Results, setting: GpuSetting, dry_run: bool) -> None:
    """What is measured."""
    train, dims = setting.config.train, setting.dims
    results.put("setting", {
        "title": ("toy of " if dry_run else "") + setting.title, "text": setting.text,
        "batch_size": train.batch_size, "parameters": dims.num_params, "tokens": setting.tokens(),
        "flops": setting.flops(),
    })  # fmt: skip


def beside_torch(results: Results, ours: OurStep, count: int) -> None:
    """Compare each form of PyTorch's step: what it computes, then how long it takes."""
    setting = ours.setting
    batches = [setting.split.batch(step) for step in range(CHECKED)]
    try:
        peers = GpuPeers(
            setting.dims, setting.config.optimizer, setting.weights, batches,
            ours.backend.pad_vocab(setting.dims.vocab_size),
        )  # fmt: skip
    except UserError as failure:
        results.skip(str(failure))
        return
    results.put("torch", peers.describe())
    running: dict[str, tuple[Run, int]] = {}
    rounds: dict[str, list[tuple[float, float]]] = {}  # milliseconds of ours and of theirs
    for names in peers.TOGETHER:
        started = {name: run for name in names if (run := start(results, ours, peers, name))}
        for name, run in started.items():
            if length := tried(results, name, partial(warmed_up, peers, run)):
                running[name] = run, length
        race(results, ours, count, peers, running, rounds, 1)
    race(results, ours, count, peers, running, rounds, ROUNDS - 1)


def start(results: Results, ours: OurStep, peers: GpuPeers, name: str) -> Run | None:
    """A form of PyTorch's step, if it works and computes what ours does."""
    if (started := tried(results, name, partial(peers.start, name))) is None:
        return None
    run, curve = started
    if disagreement := compared(ours.curve, curve):
        results.fail(f"PyTorch {name} computes something else: {disagreement}")
        return None
    return run


def race(
    results: Results,
    ours: OurStep,
    count: int,
    peers: GpuPeers,
    running: dict[str, tuple[Run, int]],
    rounds: dict[str, list[tuple[float, float]]],
    wanted: int,
) -> None:
    """So many rounds more, if there is time: ours and each of the others in turn."""
    for _ in range(wanted):
        for name, (run, burst) in list(running.items()):
            if results.left() < 5:
                return
            ours.run(1)
            mine = ours.milliseconds(count)
            theirs = tried(results, name, partial(turn, peers, run, burst))
            if theirs is None:
                del running[name]
            else:
                rounds.setdefault(name, []).append((mine, theirs))
            results.put("peers", {n: summary(pairs) for n, pairs in rounds.items()})


def tried(results: Results, name: str, call: Callable[[], Any]) -> Any:
    """What it returns, or None after noting why it does not: the others go on."""
    try:
        return call()
    except Exception as failure:  # whatever PyTorch may raise
        results.fail(f"PyTorch {name}: {first_line(failure)}")
        return None


def warmed_up(peers: GpuPeers, run: Run) -> int:
    """Steps of a burst."""
    milliseconds(run, 0, 2)
    return burst_length(turn(peers, run, 3))


def turn(peers: GpuPeers, run: Run, burst: int) -> float:
    """Milliseconds a step, behind one that is not timed."""
    milliseconds(run, 0, 1)
    taken = milliseconds(run, 0, burst)
    peers.release()
    return taken


def summary(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians; the ratio's over the rounds."""
    return {
        "ms": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(theirs / ours for ours, theirs in pairs),
        "rounds": len(pairs),
    }


def compared(ours: dict[int, Any], theirs: dict[int, tuple[float, float]]) -> str:
    """Where loss or gradient norm are too far apart, in words; empty where nowhere. A norm of
    theirs that is NaN was not asked for."""
    for step, (loss, norm) in theirs.items():
        our_loss, our_norm = ours[step]
        if not abs(loss - our_loss) <= LOSS_GAP * abs(our_loss):
            return f"step {step}: loss {loss:.5f}, ours {our_loss:.5f}"
        if norm == norm and not abs(norm - our_norm) <= NORM_GAP * our_norm:
            return f"step {step}: gradient norm {norm:.5f}, ours {our_norm:.5f}"
    return ""


def ops(results: Results, dry_run: bool) -> None:
    """Every operation at three sizes, as far as memory and time allow."""
    folder = Path(results.folder) if dry_run else None  # of choices: a dry run's are not the user's
    for case in ("shakespeare", "baby-gpt", "124m"):
        with backend(dry_run) as cuda:
            try:
                operations = Operations(setting_of(case, cuda, dry_run), cuda, NotedPlans(folder))
                for row in operations.measure(*((2, 0.0) if dry_run else (20, 0.05))):
                    results.add("ops", {"case": case, **row})
            except DeviceError as failure:
                results.fail(f"{case}: {first_line(failure)}")
        operations = None  # its memory, before the next takes its own
        gc.collect()


def generation(results: Results, dry_run: bool) -> None:
    """Texts of a full context, several side by side."""
    for case in ("shakespeare", "baby-gpt"):
        with backend(dry_run) as cuda:
            setting = setting_of(case, cuda, dry_run)
            for sequences in (1, 2) if dry_run else (1, 8, 64):
                tokens = setting.dims.block_size - 1
                try:
                    row = write_rate(setting, cuda, sequences, tokens)
                except DeviceError as failure:
                    results.fail(f"{case}, {sequences} texts: {first_line(failure)}")
                    break
                results.add("texts", {"case": case, **row})


def first_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or ['no message'])[0]}"
