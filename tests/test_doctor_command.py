"""The doctor's command: a real run, exit codes, failures, JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from gpu_microgpt import cli, doctor, doctor_trials
from gpu_microgpt.backend.usable import NoGpuError
from gpu_microgpt.doctor import Doctor
from tests.doctor_cases import BLAS, COMPILED, CORES, OUTCOME, PINNED, marks


def test_a_real_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whatever else the machine does meanwhile: its speed is not judged here."""
    monkeypatch.setattr(doctor, "SLOW", math.inf)
    monkeypatch.setattr(doctor_trials, "PATIENCE", 0.0)
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
