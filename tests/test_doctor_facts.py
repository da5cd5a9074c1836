"""What the doctor finds out about a machine."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from gpu_microgpt import doctor_facts


def test_the_quota_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpu.max"
    monkeypatch.setattr(doctor_facts, "QUOTA", file)
    assert doctor_facts.find_cores(0).quota is None
    for text, quota in (("max 100000\n", None), ("150000 100000\n", 1.5), ("", None)):
        file.write_text(text)
        assert doctor_facts.find_cores(3).quota == quota
    assert doctor_facts.find_cores(3).threads == 3
    assert doctor_facts.find_cores(0).threads == doctor_facts.find_cores(0).usable


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


def test_no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_facts, "find_spec", lambda name: None)
    assert doctor_facts.find_compiled() is None
