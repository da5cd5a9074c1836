"""Shared by the tests of writing text on the stand-in GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gpu_microgpt.backend.cuda import CudaBackend
from gpu_microgpt.generate import Generator, Sampling, Uniforms
from gpu_microgpt.graph_generate import GraphGenerator
from gpu_microgpt.model import GPT
from gpu_microgpt.params import Weights
from tests.cuda.stand_in import StandInGpu, keep_plans_in_memory
from tests.test_generate import columns, make

EVERY_LENGTH = [1, 3, 20, 2, 8, 9, 1]  # of prompts


def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products have room enough for models as small as these, which takes less time to clear."""
    keep_plans_in_memory(monkeypatch)
    monkeypatch.setattr("gpu_microgpt.backend.cuda.GEMM_WORKSPACE", 1 << 16)


class Pair:
    """One model on the host and on a stand-in GPU."""

    def __init__(self, block_size: int, dtype: str = "fp32", **options: Any) -> None:
        self.model, self.host = make(block_size, "fp32")
        self.gpu = StandInGpu(**options)
        self.backend = CudaBackend(self.gpu, dtype)
        params = Weights(self.model.dims, self.backend)
        params.load(self.model.params.to_host(self.host), self.backend)
        self.copy = GPT(params)

    def on_host(
        self, given: Sequence[np.ndarray], sampling: Sampling, uniforms: Uniforms
    ) -> list[list[int]]:
        with self.host:
            generator = Generator(self.model, self.host, len(given))
            return columns(list(generator.run(given, sampling, uniforms)))

    def generator(self, sequences: int) -> GraphGenerator:
        with self.backend:
            return GraphGenerator(self.copy, self.backend, sequences)

    def on_gpu(
        self, given: Sequence[np.ndarray], sampling: Sampling, uniforms: Uniforms,
        generator: GraphGenerator | None = None,
    ) -> list[list[int]]:  # fmt: skip
        generator = generator or self.generator(len(given))
        with self.backend:
            return columns(list(generator.run(given, sampling, uniforms)))

    def counted(self, *args: Any) -> Counter[str]:
        """What `on_gpu` costs."""
        before = self.gpu.counts.copy()
        self.on_gpu(*args)
        return self.gpu.counts - before
