"""The doctor: what it thinks of made-up facts, its trials' losses computed anew, a real run."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_microgpt import cli, doctor, doctor_facts, doctor_trials
from gpu_microgpt.backend.usable import NoGpuError
from gpu_microgpt.doctor import Diagnosis, Doctor, Finding
from gpu_microgpt.doctor_facts import Blas, Compiled, Cores
from gpu_microgpt.doctor_trials import NAMES, SHAKESPEARE, Outcome, Trial, run_trial
from gpu_microgpt.ops.reference import ReferenceOps

CORES = Cores(machine=2, usable=2, quota=None, threads=2, load=0.1)
BLAS = Blas("openblas 0.3.31", "SkylakeX", "", 150.0, 300.0)
PINNED = Blas("openblas 0.3.31", "Haswell", "Haswell", 75.0, 150.0)
COMPILED = Compiled("0.68.1", 64, "AVX-512", "", "/cache", "", 40)
OUTCOME = Outcome(
    trial="Shakespeare", engine="numpy", kernels="compiled", dtype="float32", steps=9,
    milliseconds=150.0, warm_up=0.3, flops=45e9, peak_flops=None, losses=dict(SHAKESPEARE.losses),
)  # fmt: skip
FLOAT64 = ["backend=numpy", "dtype=fp64", "threads=2"]
needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="Numba compiles the kernels")


def found(**changes: Any) -> Diagnosis:
    return replace(Diagnosis(cores=CORES, blas=BLAS, compiled=COMPILED), **changes)


def marks(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.name: finding.mark for finding in findings}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial ends after its first log interval."""
    monkeypatch.setattr(doctor_trials, "PATIENCE", 0.0)


# verdicts


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


def test_the_quota_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpu.max"
    monkeypatch.setattr(doctor_facts, "QUOTA", file)
    assert doctor_facts.find_cores(0).quota is None
    for text, quota in (("max 100000\n", None), ("150000 100000\n", 1.5), ("", None)):
        file.write_text(text)
        assert doctor_facts.find_cores(3).quota == quota
    assert doctor_facts.find_cores(3).threads == 3
    assert doctor_facts.find_cores(0).threads == doctor_facts.find_cores(0).usable


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


# trials


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


# the whole


def test_blas_is_measured_with_and_without_the_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenBLAS reads it when it is loaded, so only a process that starts without it is free."""
    monkeypatch.delenv(doctor_facts.PIN, raising=False)
    free = doctor_facts.measure_blas_unpinned(1)
    if not free.library.startswith("openblas") or platform.machine() != "x86_64":
        pytest.skip("another library, or another kind of processor")
    monkeypatch.setenv(doctor_facts.PIN, "Prescott")
    assert doctor_facts.measure_blas(1).pinned == "Prescott"
    again = doctor_facts.measure_blas_unpinned(1)
    assert (again.pinned, again.core) == ("", free.core) != ("", "Prescott")
    assert again.one_thread > 0


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert doctor_facts._unwritable(file / "below") == "Not a directory"
    assert doctor_facts._unwritable(tmp_path / "new") == ""


def test_no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_facts, "find_spec", lambda name: None)
    assert doctor_facts.find_compiled() is None


def test_a_real_run(
    short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whatever else the machine does meanwhile: its speed is not judged here."""
    monkeypatch.setattr(doctor, "SLOW", math.inf)
    file = tmp_path / "found.json"
    assert cli.main(["doctor", "--backend", "numpy", "--threads", "1", "--json", str(file)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "nothing wrong"
    assert {line[:7] for line in lines} <= {"ok     ", "note   "}
    named = {line[7:25].strip() for line in lines}
    wanted = {"Python", "cores", "BLAS", "sgemm", "kernels", "GPU", "names step", "names loss",
              "Shakespeare step", "Shakespeare loss"}  # fmt: skip
    assert named >= wanted
    written = json.loads(file.read_text())
    assert [finding["name"] for finding in written["findings"]] == [
        line[7:25].strip() for line in lines
    ]
    assert written["cores"]["threads"] == 1
    assert [outcome["trial"] for outcome in written["outcomes"]] == ["names", "Shakespeare"]


def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which all is well, without measuring anything."""
    monkeypatch.setattr(doctor, "find_cores", lambda threads: CORES)
    monkeypatch.setattr(doctor, "measure_blas", lambda threads: BLAS)
    monkeypatch.setattr(doctor, "find_compiled", lambda: COMPILED)
    monkeypatch.setattr(doctor, "find_gpu", lambda: ("NVIDIA H200", ""))
    monkeypatch.setattr(
        doctor, "run_trial",
        lambda trial, overrides: replace(OUTCOME, losses=dict(trial.losses), milliseconds=1.0),
    )  # fmt: skip


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    healthy(monkeypatch)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("nothing wrong\n")
    monkeypatch.setattr(doctor, "find_gpu", lambda: ("", "CuPy is not installed: pip"))
    assert cli.main(["doctor"]) == 0
    assert cli.main(["doctor", "--backend", "cupy"]) == 1
    out = capsys.readouterr().out
    assert "wrong  GPU               CuPy is not installed: pip\n" in out
    assert out.endswith("1 wrong\n")


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (NoGpuError("no NVIDIA GPU is seen", "see"), "no NVIDIA GPU is seen: see"),
        (ImportError("Numba needs NumPy 2.3\nor less"), "ImportError: Numba needs NumPy 2.3"),
        (MemoryError(), "MemoryError: "),
    ],
)
def test_a_part_that_fails_is_a_finding(
    failure: Exception, text: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: Any) -> Any:
        raise failure

    healthy(monkeypatch)
    monkeypatch.setattr(doctor, "run_trial", fail)
    assert cli.main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert f"wrong  names step        {text}\n" in out
    assert f"wrong  Shakespeare step  {text}\n" in out
    assert out.endswith("2 wrong\n")
    assert err == ""


def test_a_pinned_core_is_measured_without(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy(monkeypatch)
    monkeypatch.setattr(doctor, "measure_blas", lambda threads: PINNED)
    monkeypatch.setattr(doctor, "measure_blas_unpinned", lambda threads: BLAS)
    examined = Doctor()
    assert marks(examined.examine())["BLAS core"] == "note"
    assert examined.diagnosis.wrong == 0
    assert json.loads(json.dumps(asdict(examined.diagnosis)))["blas_unpinned"]["core"] == "SkylakeX"


def test_json_has_no_nan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy(monkeypatch)
    diverged = replace(OUTCOME, losses={1: math.nan})
    monkeypatch.setattr(doctor, "run_trial", lambda trial, overrides: diverged)
    file = tmp_path / "found.json"
    assert cli.main(["doctor", "--json", str(file)]) == 1
    outcome = json.loads(file.read_text(), parse_constant=pytest.fail)["outcomes"][0]
    assert outcome["losses"] == {"1": None}
    missing = tmp_path / "no" / "such"
    assert cli.main(["doctor", "--json", str(missing)]) == 2
    assert "No such file" in capsys.readouterr().err
