"""What the doctor thinks of made-up facts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from gpu_microgpt import doctor
from gpu_microgpt.doctor import Diagnosis
from gpu_microgpt.doctor_facts import Blas, Cores
from gpu_microgpt.doctor_trials import NAMES, SHAKESPEARE
from tests.doctor_cases import BLAS, COMPILED, CORES, OUTCOME, PINNED, marks


def found(**changes: Any) -> Diagnosis:
    return replace(Diagnosis(cores=CORES, blas=BLAS, compiled=COMPILED), **changes)


def test_cores() -> None:
    assert marks(doctor.judge_cores(CORES)) == {"cores": "ok"}
    assert marks(doctor.judge_cores(replace(CORES, load=None))) == {"cores": "ok"}
    assert marks(doctor.judge_cores(replace(CORES, load=1.5))) == {"cores": "ok", "load": "note"}


@pytest.mark.parametrize(
    ("cores", "advice"),
    [
        (replace(CORES, threads=8), "threads=2 is faster"),
        (replace(CORES, quota=1.0), "granted 1 core: threads=1 is faster"),
        (replace(CORES, quota=0.5), "granted 0.5 cores: threads=1 is faster"),
    ],
)
def test_too_many_threads(cores: Cores, advice: str) -> None:
    [finding] = doctor.judge_cores(cores)
    assert finding.mark == "wrong"
    assert advice in finding.text


def test_a_pinned_core_is_said_with_both_speeds() -> None:
    assert marks(doctor.judge_blas(BLAS, None, 2)) == {"BLAS": "ok", "sgemm": "ok"}
    *_, finding = doctor.judge_blas(PINNED, BLAS, 2)
    assert (finding.mark, finding.name) == ("note", "BLAS core")
    assert "OPENBLAS_CORETYPE=Haswell is set" in finding.text
    assert "unset OPENBLAS_CORETYPE" in finding.text
    assert "takes SkylakeX and does 150 GFLOP/s on one thread, 300 on 2" in finding.text
    *_, finding = doctor.judge_blas(replace(BLAS, pinned="SkylakeX"), BLAS, 2)
    assert finding.mark == "note"
    assert "would choose by itself" in finding.text
    assert marks(doctor.judge_blas(Blas("", "", "", 9, 9), None, 1))["BLAS"] == "note"


def test_kernels() -> None:
    wanted = {"kernels": "ok", "vectors": "ok", "cache": "ok"}
    assert marks(doctor.judge_compiled(COMPILED)) == wanted
    texts = {f.name: f.text for f in doctor.judge_compiled(COMPILED)}
    assert texts["vectors"] == "AVX-512, 64 bytes, bf16 too"
    texts = {f.name: f.text for f in doctor.judge_compiled(replace(COMPILED, bf16="no"))}
    assert texts["vectors"] == "AVX-512, 64 bytes, no bf16"
    broken = replace(COMPILED, unwritable="Read-only file system")
    assert marks(doctor.judge_compiled(broken)) == wanted | {"cache": "wrong"}
    [finding] = doctor.judge_compiled(None)
    assert finding.mark == "note"
    assert "pip install 'gpu-microgpt[fast]'" in finding.text


def test_compilation() -> None:
    grown = replace(COMPILED, kept=COMPILED.kept + 12)
    for before, after, mark, text in (
        (COMPILED, grown, "ok", "12 kernels compiled, once: first steps done in 0.3 s"),
        (COMPILED, COMPILED, "ok", "loaded from the cache"),
        (replace(COMPILED, unwritable="no"), COMPILED, "note", "as at every start"),
    ):
        finding = doctor.judge_compilation(OUTCOME, before, after)
        assert finding.mark == mark
        assert text in finding.text


def test_no_gpu_is_wrong_only_where_one_is_asked_for() -> None:
    for backend, mark in (("auto", "note"), ("numpy", "note"), ("cupy", "wrong")):
        assert marks(doctor.judge_gpu("", "CuPy is not installed: pip", backend)) == {"GPU": mark}
    assert marks(doctor.judge_gpu("NVIDIA H200", "", "cupy")) == {"GPU": "ok"}


@pytest.mark.parametrize(
    ("changes", "blas", "unpinned", "gflops"),
    [
        ({}, BLAS, None, 300 * SHAKESPEARE.shares["compiled"]),
        ({"kernels": "reference"}, BLAS, None, 300 * SHAKESPEARE.shares["reference"]),
        ({"kernels": "reference"}, PINNED, BLAS, 150 * SHAKESPEARE.shares["reference"]),
        # compiled kernels do not use BLAS
        ({}, PINNED, BLAS, 300 * SHAKESPEARE.shares["compiled"]),
        ({"kernels": "cuda"}, BLAS, None, None),
        ({"dtype": "bfloat16"}, BLAS, None, None),
        ({}, replace(BLAS, library=""), None, None),
    ],
)
def test_the_expected_time(
    changes: dict[str, Any], blas: Blas, unpinned: Blas | None, gflops: float | None
) -> None:
    got = doctor.expected_ms(SHAKESPEARE, replace(OUTCOME, **changes), blas, unpinned)
    assert got == (None if gflops is None else pytest.approx(45e9 / gflops / 1e6))


def test_small_models_are_expected_at_the_rate_of_one_thread() -> None:
    outcome = replace(OUTCOME, flops=2.4e6)
    share = NAMES.shares["compiled"]
    wanted = 2.4e6 / (share * 150e9) * 1e3
    assert doctor.expected_ms(NAMES, outcome, BLAS, None) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("changes", "facts", "advice"),
    [
        ({}, {}, "other programs, a hot"),
        ({}, {"cores": replace(CORES, load=3.0)}, "end other programs (load average 3.0)"),
        ({}, {"cores": replace(CORES, threads=9)}, "threads=2"),
        (
            {"kernels": "reference"},
            {"blas": PINNED, "blas_unpinned": BLAS},
            "unset OPENBLAS_CORETYPE; pip install 'gpu-microgpt[fast]'",
        ),
    ],
)
def test_a_slow_step_comes_with_advice(
    changes: dict[str, Any], facts: dict[str, Any], advice: str
) -> None:
    facts_found, outcome = found(**facts), replace(OUTCOME, **changes)
    assert facts_found.blas is not None
    usual = doctor.expected_ms(SHAKESPEARE, outcome, facts_found.blas, facts_found.blas_unpinned)
    assert usual is not None
    slow = replace(outcome, milliseconds=2.1 * usual)
    finding = doctor.judge_speed(SHAKESPEARE, slow, facts_found)
    assert (finding.mark, finding.name) == ("wrong", "Shakespeare step")
    assert advice in finding.text
    good = replace(outcome, milliseconds=1.9 * usual)
    assert doctor.judge_speed(SHAKESPEARE, good, facts_found).mark == "ok"


def test_a_step_that_nothing_is_known_of() -> None:
    gpu = replace(OUTCOME, kernels="cuda", dtype="bfloat16", milliseconds=0.5, peak_flops=9e14)
    finding = doctor.judge_speed(SHAKESPEARE, gpu, found())
    assert finding.mark == "note"
    assert "10% of the promised peak" in finding.text


def test_losses() -> None:
    assert doctor.judge_losses(SHAKESPEARE, OUTCOME).mark == "ok"
    for gap, dtype, mark in (
        (5e-6, "float32", "ok"),
        (-2e-5, "float32", "wrong"),
        (math.nan, "float32", "wrong"),
        (math.inf, "bfloat16", "wrong"),
        (1e-3, "bfloat16", "ok"),
        (1e-2, "bfloat16", "wrong"),
    ):
        losses = {**OUTCOME.losses, 6: OUTCOME.losses[6] + gap}
        outcome = replace(OUTCOME, losses=losses, dtype=dtype)
        finding = doctor.judge_losses(SHAKESPEARE, outcome)
        assert finding.mark == mark, (gap, dtype)
        assert ("at step 6, wanted 2.049562" in finding.text) == (mark == "wrong")
