"""The doctor: whether a machine's speed and loss are what they should be, a line for each fact.

`ok`: as it should be; `note`: it works, but could do better or cannot be judged; `wrong`: it does
not do what it should. doctor_facts.py looks, doctor_trials.py measures, here it is judged.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .backend.numpy import INSTALL, PIN
from .doctor_facts import (
    Blas,
    Compiled,
    Cores,
    find_compiled,
    find_cores,
    find_gpu,
    measure_blas,
    measure_blas_unpinned,
)
from .doctor_trials import NAMES, SHAKESPEARE, Outcome, Trial, run_trial
from .errors import UserError

OK, NOTE, WRONG = "ok", "note", "wrong"
SLOW = 2.0  # times the expected duration of a step that are wrong
BUSY = 0.5  # programs a core, from where on others are in the way
# Largest difference from float64 that rounding explains. Float32 differed by up to 7e-7 (both kinds
# of kernels, weights shaken by 3e-7), bfloat16 by up to 7e-4 (emulated kernels); a linear layer's
# gradients 1% too large are 4e-5 off by step 10, a wrong sign in attention's 1e-2.
TOLERANCE = {"float64": 1e-8, "float32": 1e-5, "bfloat16": 5e-3}


@dataclass(frozen=True)
class Finding:
    """A fact and what to think of it."""

    mark: str  # ok, note or wrong
    name: str
    text: str

    def __str__(self) -> str:
        """An aligned line."""
        return f"{self.mark:<6} {self.name:<17} {self.text}"


@dataclass
class Diagnosis:
    """All that was found."""

    findings: list[Finding] = field(default_factory=list)
    cores: Cores | None = None
    blas: Blas | None = None
    blas_unpinned: Blas | None = None  # where it is pinned: what it would do if it were not
    compiled: Compiled | None = None
    gpu: str = ""
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """How many things are."""
        return sum(finding.mark == WRONG for finding in self.findings)


class Doctor:
    """Examines a machine, one part after the other."""

    def __init__(self, backend: str = "auto", threads: int = 0) -> None:
        """`backend`, `threads`: as in a settings file."""
        self.backend, self.threads = backend, threads
        self.diagnosis = Diagnosis()

    def examine(self) -> Iterator[Finding]:
        """Yield every finding as soon as it is known; `diagnosis` gathers them.

        A part that fails is a finding too, whatever the failure: the others are still examined.
        """
        for name, part in (
            ("Python", self._python),
            ("cores", self._cores),
            ("BLAS", self._blas),
            ("kernels", self._kernels),
            ("GPU", self._gpu),
            (f"{NAMES.name} step", lambda: self._trial(NAMES)),
            (f"{SHAKESPEARE.name} step", lambda: self._trial(SHAKESPEARE)),
        ):
            for finding in _survived(name, part):
                self.diagnosis.findings.append(finding)
                yield finding

    def _python(self) -> Iterator[Finding]:
        yield Finding(OK, "Python", f"{platform.python_version()}, NumPy {np.__version__}")

    def _cores(self) -> Iterable[Finding]:
        self.diagnosis.cores = cores = find_cores(self.threads)
        return judge_cores(cores)

    def _blas(self) -> Iterable[Finding]:
        assert self.diagnosis.cores is not None
        threads = self.diagnosis.cores.threads
        self.diagnosis.blas = blas = measure_blas(threads)
        if blas.pinned:
            self.diagnosis.blas_unpinned = measure_blas_unpinned(threads)
        return judge_blas(blas, self.diagnosis.blas_unpinned, threads)

    def _kernels(self) -> Iterable[Finding]:
        self.diagnosis.compiled = compiled = find_compiled()
        return judge_compiled(compiled)

    def _gpu(self) -> Iterable[Finding]:
        self.diagnosis.gpu, missing = find_gpu()
        return judge_gpu(self.diagnosis.gpu, missing, self.backend)

    def _trial(self, trial: Trial) -> Iterator[Finding]:
        found = self.diagnosis
        outcome = run_trial(trial, [f"backend={self.backend}", f"threads={self.threads}"])
        found.outcomes.append(outcome)
        if trial is NAMES and outcome.kernels == "compiled":
            after = find_compiled()
            if found.compiled is not None and after is not None:
                yield judge_compilation(outcome, found.compiled, after)
        yield judge_speed(trial, outcome, found)
        yield judge_losses(trial, outcome)


def _survived(name: str, part: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The part's findings, or its failure as one."""
    try:
        yield from part()
    except UserError as failure:
        yield Finding(WRONG, name, str(failure))
    except Exception as failure:
        lines = str(failure).strip().splitlines() or [""]
        yield Finding(WRONG, name, f"{type(failure).__name__}: {lines[0]}")


def judge_cores(cores: Cores) -> Iterator[Finding]:
    """Cores, threads and who else uses them."""
    text = f"{cores.usable} of {cores.machine} usable, threads: {cores.threads}"
    limit = cores.usable if cores.quota is None else min(cores.usable, cores.quota)
    if cores.threads > limit + 0.5:
        granted = f"{limit:g} core{'s' * (limit != 1)}"
        text += f", but this process is granted {granted}: threads={max(1, int(limit))} is faster"
        yield Finding(WRONG, "cores", text)
    else:
        yield Finding(OK, "cores", text)
    if cores.load is not None and cores.load > BUSY * cores.usable:
        text = f"load average {cores.load:.1f}: other programs run, so times are not to be trusted"
        yield Finding(NOTE, "load", text)


def judge_blas(blas: Blas, unpinned: Blas | None, threads: int) -> Iterator[Finding]:
    """The library, the kind of core it takes this one for, and its speed with and without that."""
    if not blas.library:
        text = "threadpoolctl finds no library in NumPy, so that its threads cannot be limited"
        yield Finding(NOTE, "BLAS", text)
    else:
        core = f", core {blas.core}" if blas.core else ""
        yield Finding(OK, "BLAS", f"{blas.library}{core}")
    yield Finding(OK, "sgemm", _rates(blas, threads))
    if unpinned is not None:
        text = f"{PIN}={blas.pinned} is set"
        if unpinned.core == blas.core:
            yield Finding(NOTE, "BLAS core", f"{text}, to what OpenBLAS would choose by itself")
        else:
            text += f": without it (unset {PIN}) OpenBLAS takes {unpinned.core} and does "
            yield Finding(NOTE, "BLAS core", text + _rates(unpinned, threads))


def _rates(blas: Blas, threads: int) -> str:
    both = f", {blas.all_threads:.0f} on {threads}" if threads > 1 else ""
    return f"{blas.one_thread:.0f} GFLOP/s on one thread{both}"


def judge_compiled(compiled: Compiled | None) -> Iterator[Finding]:
    """Numba, the vectors it compiles for, and where it keeps its work."""
    if compiled is None:
        yield Finding(NOTE, "kernels", f"plain NumPy, as Numba is not installed: {INSTALL}")
        return
    yield Finding(OK, "kernels", f"compiled by Numba {compiled.numba}")
    bf16 = "no bf16" if compiled.bf16 else "bf16 too"
    text = f"{compiled.instructions}, {compiled.vector_bytes} bytes, {bf16}"
    yield Finding(OK, "vectors", text)
    if compiled.unwritable:
        text = (
            f"{compiled.folder} cannot be written ({compiled.unwritable}): kernels are compiled "
            "anew at every start; set XDG_CACHE_HOME to a folder that can"
        )
        yield Finding(WRONG, "cache", text)
    else:
        yield Finding(OK, "cache", compiled.folder)


def judge_compilation(outcome: Outcome, before: Compiled, after: Compiled) -> Finding:
    """Whether kernels had to be compiled for the first steps, by what the cache has since."""
    seconds = f"first steps done in {outcome.warm_up:.1f} s"
    if before.unwritable:
        return Finding(NOTE, "compilation", f"kernels compiled, as at every start: {seconds}")
    if added := after.kept - before.kept:
        return Finding(OK, "compilation", f"{added} kernels compiled, once: {seconds}")
    return Finding(OK, "compilation", f"kernels loaded from the cache: {seconds}")


def judge_gpu(gpu: str, missing: str, backend: str) -> Iterator[Finding]:
    """The GPU, or why there is none."""
    if gpu:
        yield Finding(OK, "GPU", gpu)
    else:
        yield Finding(WRONG if backend == "cupy" else NOTE, "GPU", missing)


def expected_ms(trial: Trial, outcome: Outcome, blas: Blas, unpinned: Blas | None) -> float | None:
    """A step at the share of the product's rate that is known to be reached; None: not known.

    Compiled kernels do not use BLAS, so what it is pinned to does not excuse them.
    """
    share = trial.shares.get(outcome.kernels)
    if share is None or not blas.library or outcome.dtype != "float32":
        return None
    best = unpinned if unpinned is not None and outcome.kernels == "compiled" else blas
    rate = max(best.all_threads, best.one_thread) if trial.all_cores else best.one_thread
    return outcome.flops / (share * rate) / 1e6


def judge_speed(trial: Trial, outcome: Outcome, found: Diagnosis) -> Finding:
    """A step's duration beside the expected one."""
    name, ms = f"{trial.name} step", outcome.milliseconds
    text = f"{ms:.3g} ms, {outcome.flops / ms / 1e6:.3g} GFLOP/s"
    expected = None
    if found.blas is not None:
        expected = expected_ms(trial, outcome, found.blas, found.blas_unpinned)
    if outcome.peak_flops is not None:
        text += f", {1e3 * outcome.flops / ms / outcome.peak_flops:.0%} of the promised peak"
    if expected is None:
        return Finding(NOTE, name, f"{text}: nothing is known to compare with ({outcome.engine})")
    text += f", {outcome.kernels} kernels; expected about {expected:.3g} ms"
    if ms <= SLOW * expected:
        return Finding(OK, name, text)
    return Finding(WRONG, name, f"{text}: {'; '.join(_reasons(outcome, found))}")


def _reasons(outcome: Outcome, found: Diagnosis) -> list[str]:
    """What may make steps slow, the likeliest first."""
    reasons = []
    cores, blas = found.cores, found.blas
    if cores is not None and cores.load is not None and cores.load > BUSY * cores.usable:
        reasons.append(f"end other programs (load average {cores.load:.1f})")
    if cores is not None and cores.threads > cores.usable:
        reasons.append(f"threads={cores.usable}, as there are no more cores")
    if outcome.kernels == "reference" and blas is not None and blas.pinned:
        reasons.append(f"unset {PIN}")
    if outcome.kernels == "reference":
        reasons.append(f"{INSTALL} compiles the kernels")
    return reasons or ["other programs, a hot or saving processor, or cores shared with others?"]


def judge_losses(trial: Trial, outcome: Outcome) -> Finding:
    """The losses beside those of float64."""
    name, tolerance = f"{trial.name} loss", TOLERANCE[outcome.dtype]
    worst = 0.0
    for step, loss in outcome.losses.items():
        gap = abs(loss - trial.losses[step])
        if not gap <= tolerance:  # NaN is none
            text = (
                f"{loss:.6f} at step {step}, wanted {trial.losses[step]:.6f} to {tolerance:.0e}: "
                f"this machine computes something else ({outcome.engine})"
            )
            return Finding(WRONG, name, text)
        worst = max(worst, gap)
    last, count = max(outcome.losses), len(outcome.losses)
    text = (
        f"{outcome.losses[last]:.6f} at step {last}; {count} losses within {worst:.1e} of float64"
    )
    return Finding(OK, name, f"{text} (allowed: {tolerance:.0e})")
