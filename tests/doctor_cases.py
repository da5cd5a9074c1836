"""Shared by the tests of the doctor: a machine on which all is well."""

from __future__ import annotations

from collections.abc import Iterable

from gpu_microgpt.doctor import Finding
from gpu_microgpt.doctor_facts import Blas, Compiled, Cores
from gpu_microgpt.doctor_trials import SHAKESPEARE, Outcome

CORES = Cores(machine=2, usable=2, quota=None, threads=2, load=0.1)
BLAS = Blas("openblas 0.3.31", "SkylakeX", "", 150.0, 300.0)
PINNED = Blas("openblas 0.3.31", "Haswell", "Haswell", 75.0, 150.0)
COMPILED = Compiled("0.68.1", 64, "AVX-512", "", "/cache", "", 40)
OUTCOME = Outcome(
    trial="Shakespeare", engine="numpy", kernels="compiled", dtype="float32", steps=9,
    milliseconds=150.0, warm_up=0.3, flops=45e9, peak_flops=None, losses=dict(SHAKESPEARE.losses),
)  # fmt: skip


def marks(findings: Iterable[Finding]) -> dict[str, str]:
    return {finding.name: finding.mark for finding in findings}
