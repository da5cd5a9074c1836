"""The doctor's trials: their losses computed anew, mistakes noticed, the clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_microgpt import doctor, doctor_trials
from gpu_microgpt.doctor_trials import NAMES, SHAKESPEARE, Outcome, Trial, run_trial
from gpu_microgpt.ops.reference import ReferenceOps

FLOAT64 = ["backend=numpy", "dtype=fp64", "threads=2"]
needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="Numba compiles the kernels")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial ends after its first log interval."""
    monkeypatch.setattr(doctor_trials, "PATIENCE", 0.0)


def assert_recorded(trial: Trial, outcome: Outcome) -> None:
    """To the digits that stand in the code."""
    assert outcome.dtype == "float64"
    for step, loss in outcome.losses.items():
        assert loss == pytest.approx(trial.losses[step], abs=2e-9), step


def test_the_losses_of_names_are_those_of_float64() -> None:
    outcome = run_trial(NAMES, [*FLOAT64, "kernels=reference"])
    assert outcome.losses.keys() == NAMES.losses.keys()
    assert_recorded(NAMES, outcome)


def test_the_losses_of_shakespeare_are_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiled kernels where there are any: a third of the time."""
    monkeypatch.setattr(doctor_trials, "PATIENCE", math.inf)
    outcome = run_trial(SHAKESPEARE, FLOAT64)
    assert outcome.losses.keys() == SHAKESPEARE.losses.keys()
    assert_recorded(SHAKESPEARE, outcome)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kernels", ["reference", pytest.param("compiled", marks=needs_numba)])
def test_float32_is_found_right(kernels: str) -> None:
    outcome = run_trial(NAMES, ["backend=numpy", f"kernels={kernels}"])
    assert (outcome.kernels, outcome.dtype, outcome.steps) == (kernels, "float32", 50)
    assert 0 < outcome.milliseconds <= 1e3 * outcome.warm_up
    assert doctor.judge_losses(NAMES, outcome).mark == "ok"


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("operation", "factor"),
    [("linear_backward", 1.01), ("attention_backward", -1), ("linear_relu", 1.001)],
)
def test_operations_a_little_wrong_are_noticed(
    operation: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Callable[..., None] = getattr(ReferenceOps, operation)

    def wrong(self: Any, out: Any, *rest: Any) -> None:
        right(self, out, *rest)
        out *= factor

    monkeypatch.setattr(ReferenceOps, operation, wrong)
    outcome = run_trial(NAMES, ["backend=numpy", "kernels=reference"])
    assert doctor.judge_losses(NAMES, outcome).mark == "wrong"


def test_compiling_takes_nothing_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first log interval is as long as it is; the step's time is that of those after it."""
    ticks = iter([0.0, 100.0, *(100.0 + i for i in range(40))])
    monkeypatch.setattr(doctor_trials, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    outcome = run_trial(NAMES, ["backend=numpy", "kernels=reference"])
    assert outcome.warm_up == pytest.approx(100.0)
    assert outcome.steps == 350  # six turns of a second each
    assert outcome.milliseconds == pytest.approx(1e3 / 50)


def test_the_text_is_always_the_same() -> None:
    text = doctor_trials.made_up_text()
    assert len(text) == 28_286
    assert text.startswith("be\nberoditu\ntodarutu\n")
