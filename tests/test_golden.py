"""configs/microgpt.yaml against what Karpathy's microgpt.py printed, number for number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gpu_microgpt.checkpoint import State, find
from gpu_microgpt.config import Config
from gpu_microgpt.data.corpus import load_corpus
from gpu_microgpt.data.download import DownloadError
from gpu_microgpt.trainer import Trainer
from tests.run_helpers import no_warning, rows

GOLDEN = json.loads((Path(__file__).parent / "golden" / "microgpt_py.json").read_text())


@pytest.fixture(scope="module", params=["reference", "compiled"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of the shipped settings."""
    if request.param == "compiled":
        pytest.importorskip("numba", reason="the compiled operations need Numba")
    folder = tmp_path_factory.mktemp("golden")
    config = Config.load("microgpt", [f"run.dir={folder}", f"kernels={request.param}"])
    try:
        load_corpus(config.data, log=print)
    except DownloadError as failure:
        pytest.skip(f"needs names.txt, by GPU_MICROGPT_DATA or by download: {failure}")
    assert Trainer(config).run() == 0
    return config.run.path


def total(arrays: dict[str, Any]) -> float:
    """Sum of all weights, exactly rounded (the flat buffer has only zeros between them)."""
    return math.fsum(float(x) for array in arrays.values() for x in array.flat)


def test_every_loss(run: Path) -> None:
    losses = [row["loss/train"] for row in rows(run)]
    assert [row["step"] for row in rows(run)] == list(range(1, 1001))
    differences = [abs(got - wanted) for got, wanted in zip(losses, GOLDEN["losses"], strict=True)]
    assert max(differences) <= 1e-12


def test_learning_rates(run: Path) -> None:
    wanted = [0.01 * (1 - step / 1000) for step in range(1000)]
    assert [row["lr"] for row in rows(run)] == pytest.approx(wanted, abs=1e-17)


def test_final_parameters(run: Path) -> None:
    state: State = find(run, "last", warn=no_warning)
    assert state.step == 1000
    assert sum(array.size for array in state.weights.values()) == GOLDEN["num_params"]
    assert abs(total(state.weights) - GOLDEN["final_sum"]) <= 1e-12


def test_twenty_names(run: Path) -> None:
    assert (GOLDEN["samples"][0], GOLDEN["samples"][-1]) == ("kamon", "anton")
    text = (run / "samples" / "step-00001000.txt").read_text(encoding="utf-8")
    assert text.splitlines() == GOLDEN["samples"]
