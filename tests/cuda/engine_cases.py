"""Shared by the tests of training with backend=cupy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gpu_microgpt.backend import choose
from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.config import Config
from gpu_microgpt.data.corpus import load_corpus
from gpu_microgpt.data.dataset import Dataset
from gpu_microgpt.dims import Dims
from gpu_microgpt.engine import HostEngine, make_engine
from gpu_microgpt.graph_step import GraphStep
from gpu_microgpt.model import GPT
from gpu_microgpt.params import Weights, initial_weights
from gpu_microgpt.rng import Stream, normal
from tests.cuda.machine import bf16
from tests.run_helpers import QUIET, no_warning, rows, settings

CUPY = ("backend=cupy", "dtype=fp32")
EVERY_STEP = (*QUIET, "train.log_interval=1", "sample.num=0", "checkpoint.interval=0")


def losses(run: Path) -> np.ndarray:
    return np.array([row["loss/train"] for row in rows(run) if "loss/train" in row])


def dataset_of(config: Config) -> Dataset:
    """The config's own text."""
    return Dataset.build(config, load_corpus(config.data, log=no_warning), log=lambda line: None)


def engine_of(folder: Path, *overrides: str) -> GraphStep:
    """A step on its own, outside a trainer."""
    engine = _engine(settings(folder, *EVERY_STEP, "backend=cupy", *overrides))
    assert isinstance(engine, GraphStep)
    return engine


def host_engine_of(folder: Path, *overrides: str) -> HostEngine:
    """The same on the CPU, with the same weights."""
    engine = _engine(settings(folder, *EVERY_STEP, "backend=numpy", *overrides))
    assert isinstance(engine, HostEngine)
    return engine


def _engine(config: Config) -> Any:
    dataset, backend = dataset_of(config), choose(config)
    dims = Dims.of(config.model, dataset.tokenizer.vocab_size)
    weights = Weights(dims, backend)
    draws = 0.1 * normal(0, Stream.INIT, dims.num_params)
    weights.load(initial_weights(dims, draws, False), backend)
    return make_engine(GPT(weights), config, backend, dataset.train, 100)


class RoundingOps:
    """The reference's operations with every result rounded to bfloat16: what a plain bf16 trainer
    computes. Weights' gradients, statistics and moments stay as they are."""

    ROUNDED = frozenset({
        "embedding_rmsnorm", "rmsnorm", "linear", "linear_add", "linear_relu", "linear_backward",
        "relu_linear_backward", "rmsnorm_backward", "rmsnorm_backward_add", "attention",
        "attention_backward", "cross_entropy_backward",
    })  # fmt: skip

    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._ops, name)

        def rounded(*args: Any) -> None:
            call(*args)
            result = args[0] if name in self.ROUNDED else args[3] if name == "adamw" else None
            if result is not None:
                result[...] = result.astype(bf16)

        return rounded


class RoundingBackend(NumpyBackend):
    """float32 that holds bfloat16 numbers; weights and sums in float64."""

    def __init__(self) -> None:
        super().__init__("fp32")
        self.master = np.dtype(np.float64)

    def workspace_bytes(self, *sizes: Any) -> int:
        return 2 * super().workspace_bytes(*sizes)

    def ops(self, workspace: Any) -> Any:
        return RoundingOps(super().ops(workspace))
