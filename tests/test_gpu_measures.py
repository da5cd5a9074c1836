"""What the GPU suite measures, and the race with PyTorch, on the stand-in."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from gpu_microgpt.ops.protocol import Ops

if sys.platform != "linux":
    pytest.skip("the suite is for Linux", allow_module_level=True)

from tests.cuda_on_cpu.compiler import require_compiler
from tests.gpu_suite import measured
from tests.gpu_suite.places import backend
from tests.gpu_suite.results import Results


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "part.json", 60)


@pytest.fixture
def cuda():
    require_compiler()
    with backend(dry_run=True) as cuda:
        yield cuda


def test_without_torch_nothing_is_compared(results, monkeypatch, cuda):
    monkeypatch.setitem(sys.modules, "torch", None)
    ours = measured.OurStep(measured.setting_of("names", cuda, True), cuda)
    measured.beside_torch(results, ours, 2)
    assert "torch is not installed" in results.items["skipped"][0]
    assert not results.failed


class Peers:
    """Forms of a step of which one agrees, one computes something else, one does not start and one
    breaks off when it has run for a while."""

    TOGETHER = (("agrees",), ("differs", "fails", "breaks"))

    def __init__(self, ours: measured.OurStep) -> None:
        self._curve = ours.curve

    def describe(self) -> str:
        return "another engine"

    def start(self, name: str):
        if name == "fails":
            raise RuntimeError("out of memory\nand more")
        factor = 1.02 if name == "differs" else 1.0
        curve = {step: (loss * factor, float("nan")) for step, (loss, _) in self._curve.items()}
        return name, curve

    def release(self) -> None:
        pass


def test_engines_take_turns_if_they_agree(results, monkeypatch, cuda):
    ours = measured.OurStep(measured.setting_of("names", cuda, True), cuda)
    monkeypatch.setattr(measured, "GpuPeers", lambda *args: Peers(ours))
    timed = []

    def milliseconds(run: str, first: int, count: int) -> float:
        timed.append(run)
        if run == "breaks" and timed.count(run) == 6:  # in the second round
            raise RuntimeError("lost")
        return 100.0

    monkeypatch.setattr(measured, "milliseconds", milliseconds)
    measured.beside_torch(results, ours, 2)
    rows = results.items["peers"]
    assert {name: row["rounds"] for name, row in rows.items()} == {
        "agrees": measured.ROUNDS + 1, "breaks": 1,
    }  # fmt: skip
    assert rows["agrees"]["ms"] == 100.0
    assert rows["agrees"]["ratio"] == pytest.approx(100.0 / ours.milliseconds(2))
    differs, fails, breaks = results.items["failures"]
    assert "PyTorch differs computes something else: step 1: loss" in differs
    assert fails == "PyTorch fails: RuntimeError: out of memory"
    assert breaks == "PyTorch breaks: RuntimeError: lost"


def test_losses_and_norms_are_compared():
    ours = {1: (4.0, 2.0), 2: (3.0, 1.0)}
    assert measured.compared(ours, {1: (4.01, 2.02), 2: (3.0, float("nan"))}) == ""
    assert "step 2: loss" in measured.compared(ours, {1: (4.0, 2.0), 2: (3.1, 1.0)})
    assert "step 1: gradient norm" in measured.compared(ours, {1: (4.0, 2.1)})
    assert "loss nan" in measured.compared(ours, {1: (float("nan"), 2.0)})


def test_allocations_after_the_first_step_are_found(results, monkeypatch, cuda):
    from gpu_microgpt.graph_step import GraphStep

    train, kept = GraphStep.train, []

    def wasteful(self: GraphStep, step: int) -> None:
        train(self, step)
        kept.append(self.gpu.empty((1 << 20,), np.uint8))

    monkeypatch.setattr(GraphStep, "train", wasteful)
    ours = measured.OurStep(measured.setting_of("names", cuda, True), cuda)
    assert ours.allocations == len(kept) - 1
    assert ours.growth == ours.allocations << 20
    assert cuda.gpu.empty.__name__ == "empty"  # no longer counted


@pytest.fixture
def operations(cuda, tmp_path):
    setting = measured.setting_of("shakespeare", cuda, True)
    return measured.Operations(setting, cuda, measured.NotedPlans(tmp_path))


def test_every_operation_is_timed(operations):
    rows = {row["op"]: row for row in operations.measure(1, 0.0)}
    protocol = {name for name in vars(Ops) if not name.startswith("_")}
    assert not protocol - {name.partition(" ")[0] for name in rows}
    assert all(row["us"] > 0 and row["bytes"] > 0 for row in rows.values())
    dims, n = operations.dims, operations.rows
    c, vocab = dims.n_embd, 72
    products = 6 * n * (vocab * c + 12 * c * c)  # of the model's one layer
    attention = 3.5 * 2 * n * c * (dims.block_size + 1)
    assert sum(row["flops"] for row in rows.values()) == products + attention
    item = 2
    for name, moved in (
        ("relu", 2 * 4 * c * n * item),
        ("rmsnorm", 2 * n * c * item + 4 * n),
        ("linear attn_wqkv", (4 * n * c + 3 * c * c) * item),
        ("attention", 4 * n * c * item + 4 * n * dims.n_head),
        ("adamw", operations.grads.flat.size * (7 * 4 + item)),
    ):
        assert rows[name]["bytes"] == moved, name
    assert len(rows["linear_backward mlp_fc1"]["algorithms"]) == 2
    assert {name for name, row in rows.items() if "fused" in row} == {
        "linear_relu mlp_fc1", "relu_linear_backward mlp_fc2",
    }  # fmt: skip
