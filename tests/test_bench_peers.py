"""What is measured against trains the same model the same way; where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_microgpt.backend import choose
from gpu_microgpt.bench_jax import JaxTrainee
from gpu_microgpt.bench_ours import OurTrainee, measure_writing, timed
from gpu_microgpt.bench_rows import SCAN, Row
from gpu_microgpt.bench_setting import Setting, train_to_end
from gpu_microgpt.bench_torch_cpu import TorchTrainee
from gpu_microgpt.bench_torch_cpu import measure_writing as measure_torch_writing
from tests.run_helpers import write_text

SMALL = (
    "model.n_layer=2", "model.n_head=2", "model.n_embd=8", "train.batch_size=4",
    "kernels=reference",
)  # fmt: skip
# a rate and a clipping that show in the losses
FAST = ("optimizer.lr=1e-2", "optimizer.grad_clip=0.5", "train.steps=150", "schedule.name=linear")
DECAY = ("optimizer.name=adamw", "optimizer.weight_decay=0.3")


def setting(folder: Path, *more: str, kind: str = "loss", config: str = "names") -> Setting:
    differs = (*SMALL, f"data.source={write_text(folder)}", *more)
    return Setting(Row(kind, "small", config, differs, "s", 1, SCAN))  # type: ignore[arg-type]


def torch(setting: Setting) -> Any:
    pytest.importorskip("torch")
    return TorchTrainee(setting, compiled=False)


def jax(setting: Setting) -> Any:
    pytest.importorskip("jax")
    return JaxTrainee(setting, scan=False)


def jax_scan(setting: Setting) -> Any:
    pytest.importorskip("jax")
    return JaxTrainee(setting, scan=True)


@pytest.mark.parametrize("peer", [torch, jax, jax_scan])
@pytest.mark.parametrize("differs", [FAST, (*FAST, *DECAY)])
def test_the_same_losses_to_the_end(peer, differs, tmp_path):
    small = setting(tmp_path, *differs)
    theirs = np.array(train_to_end(peer(small), small))
    backend = choose(small.config)
    with backend:
        ours = np.array(train_to_end(OurTrainee(small, backend), small))
    assert len(ours) == 150
    assert ours[-20:].mean() < ours[:20].mean() - 0.2
    np.testing.assert_allclose(theirs[:30], ours[:30], rtol=1e-4)
    np.testing.assert_allclose(theirs, ours, rtol=2e-2)


def test_the_same_greedy_text(tmp_path):
    pytest.importorskip("torch")
    stream = ("model.block_size=32", "model.init_std=0.3")
    small = setting(tmp_path, *stream, kind="generate", config="shakespeare")
    first = int(small.dataset.tokenizer.encode("a")[0])
    ours = measure_writing(small, "a", 31, 0)
    theirs = measure_torch_writing(small, first, 31, 0, timed)
    assert ours["tokens"] == theirs["tokens"]
    assert len(ours["tokens"]) == 31
    assert len(set(ours["tokens"])) > 1
    assert min(ours["tokens_per_second"], theirs["tokens_per_second"]) > 1
