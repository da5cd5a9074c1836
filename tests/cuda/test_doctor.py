"""The doctor's trials with backend=cupy: on a GPU all of it, on the stand-in the first steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_microgpt import doctor, doctor_trials
from gpu_microgpt.doctor_trials import NAMES, run_trial


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_the_losses_are_those_of_float64(dtype, name, place, monkeypatch):
    monkeypatch.setattr(doctor_trials, "PATIENCE", 0.0)
    turns = "train.log_interval=10"
    trial = replace(NAMES, overrides=(*NAMES.overrides, turns))
    outcome = run_trial(trial, ["backend=cupy", f"dtype={dtype}"])
    assert (outcome.kernels, outcome.dtype, outcome.steps) == ("cuda", name, 10)
    assert outcome.peak_flops
    finding = doctor.judge_losses(NAMES, outcome)
    assert finding.mark == "ok", finding
    assert "3 losses" in finding.text
    assert doctor.judge_speed(NAMES, outcome, doctor.Diagnosis()).mark == "note"


def test_the_gpu_is_described(place):
    assert doctor.find_gpu()[1] == ""
    assert "sm_" in doctor.find_gpu()[0]
