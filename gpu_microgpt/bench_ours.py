"""Our own figures for the CPU's benchmark: the training step through the engine that a run uses,
batches made inside; writing text; and what BLAS reaches beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from .backend import Backend, choose
from .bench_setting import LEAST, WARM_UP, Setting, time_training
from .engine import make_engine
from .host_step import HostEngine
from .model import GPT
from .params import Weights
from .profile import Profiler
from .text_model import TextModel

SGEMM, SGEMM_TRIES = 2048, 5  # size of the product, and how often


class OurTrainee:
    """The engine; enqueues the steps, then waits for their figures."""

    def __init__(
        self, setting: Setting, backend: Backend, profiler: Profiler | None = None
    ) -> None:
        """Take memory, and the initial weights."""
        self.name, self.positions = backend.describe(), setting.positions()
        self._profiler = profiler
        engine = make_engine(
            _model(setting, backend), setting.config, backend, setting.dataset.train,
            setting.steps, profiler,
        )  # fmt: skip
        assert isinstance(engine, HostEngine)
        self.engine = engine

    def steps(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """As a Trainee's."""
        numbers = np.arange(first, first + count)
        if self._profiler is None:
            self.engine.train(first, count)
        else:
            for step in numbers.tolist():
                with self._profiler.step(step):
                    self.engine.train(step)
        records = self.engine.ask().records()
        losses: np.ndarray[Any, Any] = records[numbers % len(records), 0]
        return losses


def measure_training(setting: Setting, seconds: float, shares: bool) -> dict[str, Any]:
    """Time the step, and BLAS; with `shares` also {operation: share of the time}. Raises
    BackendError for what this CPU cannot do."""
    backend, together = choose(setting.config), setting.row.together
    with backend:
        found = time_training(OurTrainee(setting, backend), together, seconds)
        if shares:
            found["ops"] = _op_shares(setting, backend, 1e-3 * found["ms"] * together, seconds)
    return found | {"sgemm_gflops": sgemm(backend.threads)}


def _op_shares(setting: Setting, backend: Backend, pace: float, seconds: float) -> dict[str, float]:
    """Of the operations' time, largest first: those of a recorded step each alone, else in steps of
    their own that take about `seconds`."""
    together = setting.row.together
    trainee = OurTrainee(setting, backend)
    trainee.steps(1, together)
    times = trainee.engine.instruction_times(seconds)
    if not times:
        looks = 1 + int(np.clip(seconds / pace, 2, 200 // together + 2))
        profiler = Profiler(looks * together)
        trainee = OurTrainee(setting, backend, profiler)
        for look in range(looks):
            trainee.steps(1 + look * together, together)
        times = {row.name: row.microseconds for row in profiler.rows()}
    total = sum(times.values())
    return {name: t / total for name, t in sorted(times.items(), key=lambda item: -item[1])}


def measure_writing(setting: Setting, prompt: str, length: int, seconds: float) -> dict[str, Any]:
    """Time texts of `length` tokens behind `prompt`, one at a time, drawn at temperature 1, by a
    model with the initial weights; with its greedy text as "tokens"."""
    backend, tokenizer = choose(setting.config), setting.dataset.tokenizer
    model = TextModel(_model(setting, backend), tokenizer, setting.config, backend)

    def write(temperature: float = 1.0) -> str:
        return model.generate(prompt, max_tokens=length, temperature=temperature)[0]

    with backend:
        greedy = write(0.0)
        times = timed(write, seconds)
    tokens = tokenizer.encode(greedy)[len(prompt) :].tolist()
    return {"tokens_per_second": length / statistics.median(times), "tokens": tokens,
            "engine": backend.describe(), "sgemm_gflops": sgemm(backend.threads)}  # fmt: skip


def timed(run: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, behind a warm-up."""
    for _ in range(WARM_UP):
        run()
    times: list[float] = []
    while len(times) < LEAST or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def sgemm(threads: int) -> float:
    """GFLOP/s of float32 products of 2048 x 2048, NumPy's BLAS, one on each thread side by side as
    shards of a batch are; the best of some tries."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((SGEMM, SGEMM)).astype(np.float32)
    outs = [np.empty_like(a) for _ in range(threads)]
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:

        def seconds() -> float:
            start = time.perf_counter()
            list(pool.map(lambda out: np.matmul(a, a, out=out), outs))
            return time.perf_counter() - start

        best = min(seconds() for _ in range(1 + SGEMM_TRIES))
    return 2 * SGEMM**3 * threads / best / 1e9


def _model(setting: Setting, backend: Backend) -> GPT:
    """With the initial weights."""
    model = GPT(Weights(setting.dims, backend))
    model.params.load(setting.weights, backend)
    return model
