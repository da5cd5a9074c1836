"""Rows and measurements small enough for tests of the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_microgpt.bench_rows import Row
from tests.run_helpers import write_text

TINY = ("model.n_embd=8", "model.n_head=2", "train.batch_size=4", "kernels=reference")


def tiny(folder: Path, **others: Any) -> Row:
    """A row small enough for a test, on made-up words."""
    differs = (*TINY, f"data.source={write_text(folder)}", *others.pop("differs", ()))
    given = {"kind": "train", "unit": "us/sample", "threads": 1, "together": 8, **others}
    return Row(title="tiny", config="names", differs=differs, **given)


def ran(ms: float, **more: Any) -> dict[str, Any]:
    """One measurement of a step."""
    found = {"ms": ms, "losses": [3.0, 2.9], "positions": 28.0, "cores": 1.0, "engine": "it"}
    return {**found, "sgemm_gflops": 100.0, **more}
