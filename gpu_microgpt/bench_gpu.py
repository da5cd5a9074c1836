"""Measures what a GPU does with a training step, with writing text, and at its best.

Times are the device's own, by events, medians of many; the host's are said to be the host's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .backend.cuda import CudaBackend
from .backend.gpu import Gpu, Graph
from .bench_gpu_setting import GpuSetting
from .generate import PhiloxUniforms, Sampling
from .graph_generate import GraphGenerator
from .graph_step import GraphStep
from .model import GPT
from .ops.cuda.plan_cache import PlanCache
from .params import Weights

CHECKED = 9  # first steps, whose loss and gradient norm another engine must agree with
BURST_SECONDS = 0.05  # that steps are timed together for
HOST_STEPS = 50
TOTAL_STEPS = 1_000_000  # of the schedule, which is constant


class NotedPlans(PlanCache):
    """Also says which choices were asked for or made."""

    def __init__(self, folder: Path | None = None) -> None:
        """Use `folder`, or the user's cache."""
        super().__init__(folder)
        self._seen: dict[str, str] = {}

    def get(self, machine: str, problem: str) -> str | None:
        """What was kept."""
        kept = super().get(machine, problem)
        if kept is not None:
            self._seen[problem] = kept
        return kept

    def put(self, machine: str, problem: str, choice: str) -> None:
        """Keep it."""
        self._seen[problem] = choice
        super().put(machine, problem, choice)

    def take(self) -> dict[str, str]:
        """Choices by problem since the last time."""
        taken, self._seen = self._seen, {}
        return taken


class OurStep:
    """A setting in training; the first steps, which are eager, are done."""

    def __init__(self, setting: GpuSetting, backend: CudaBackend) -> None:
        """Take memory, do `CHECKED` steps; `curve`: {step: (loss, gradient norm)}."""
        self.setting, self.backend, self.gpu = setting, backend, backend.gpu
        before = backend.memory_used()
        model = GPT(Weights(setting.dims, backend))
        model.params.load(setting.weights, backend)
        self.engine = GraphStep(model, setting.config, backend, setting.split, TOTAL_STEPS)
        self._done = 0
        self.run(1)
        with counted_allocations(self.gpu) as allocations:
            after_first = backend.memory_used()
            self.run(CHECKED - 1)
            records = self.engine.ask().records()
            self.curve = {s: tuple(map(float, records[s, :2])) for s in range(1, CHECKED + 1)}
            self.run(1)
            self.gpu.wait()
        self.allocations = allocations[0]  # after the first step,
        self.growth = backend.memory_used() - after_first  # and bytes that are not free since
        self.memory = after_first - before

    def run(self, count: int) -> None:
        """Enqueue so many steps."""
        for _ in range(count):
            self._done += 1
            self.engine.train(self._done)

    def milliseconds(self, count: int) -> float:
        """Mean of so many steps, by events."""
        before = self.gpu.event()
        self.run(count)
        return self.gpu.event().ms_since(before) / count

    def host_microseconds(self, count: int = HOST_STEPS) -> float:
        """Median of what the host takes to enqueue a step while the device is busy with others."""
        self.gpu.wait()
        self.run(3)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self.run(1)
            times.append(time.perf_counter() - start)
        self.gpu.wait()
        return 1e6 * statistics.median(times)

    def figures(self, times: list[float]) -> dict[str, Any]:
        """What bursts of these milliseconds a step come to."""
        ms, setting = statistics.median(times), self.setting
        flops, peak = setting.flops(), self.backend.peak_flops()
        return {
            "ms": ms,
            "bursts": len(times),
            "spread": [min(times), max(times)],
            "tokens_per_second": setting.tokens() / ms * 1e3,
            "tflops": flops / ms / 1e9,
            "share_of_peak": flops / ms * 1e3 / peak if peak else None,
            "host_us": self.host_microseconds(),
            "allocations": self.allocations,
            "growth_bytes": self.growth,
            "memory_bytes": self.memory,
        }


def burst_length(milliseconds: float, seconds: float = BURST_SECONDS) -> int:
    """Steps to time together, where one takes so long."""
    return max(2, min(500, int(1e3 * seconds / max(milliseconds, 1e-6))))


@contextmanager
def counted_allocations(gpu: Gpu) -> Iterator[list[int]]:
    """Count what is asked of `gpu.empty` meanwhile, in the one item of the list."""
    count, empty = [0], gpu.empty

    def counting(shape: tuple[int, ...], dtype: Any) -> Any:
        count[0] += 1
        return empty(shape, dtype)

    gpu.empty = counting  # type: ignore[method-assign]
    try:
        yield count
    finally:
        gpu.empty = empty  # type: ignore[method-assign]


def milliseconds_of(
    gpu: Gpu, work: Callable[[], None], launches: int = 20, seconds: float = 0.1
) -> float:
    """Median time of `work` on the device, many captured together so that no launch is seen.

    `work` may be repeated at will. It is done once before the capture, which loads its kernels.
    """
    work()

    def together() -> None:
        for _ in range(launches):
            work()

    graph = gpu.capture(together)
    once = graph_milliseconds(gpu, graph)
    rounds = max(3, min(50, int(1e3 * seconds / max(once, 1e-6))))
    return statistics.median(graph_milliseconds(gpu, graph) for _ in range(rounds)) / launches


def graph_milliseconds(gpu: Gpu, graph: Graph) -> float:
    """Of one replay."""
    before = gpu.event()
    graph.launch()
    return gpu.event().ms_since(before)


def copy_rate(gpu: Gpu, nbytes: int) -> float:
    """GB/s, read and written, of copies of so many bytes on the device."""
    source, to = (gpu.empty((nbytes,), np.uint8) for _ in range(2))
    gpu.zero(source)
    return 2 * nbytes / milliseconds_of(gpu, lambda: gpu.copy(to, source)) / 1e6


def product_rate(backend: CudaBackend, size: int) -> float:
    """TFLOP/s of a size^3 product of random numbers, by the engine's own `linear`."""
    rng, ops = np.random.default_rng(0), backend.ops(backend.empty((256,), np.uint8))
    x, w = (
        backend.from_host(rng.standard_normal((size, size), np.float32).astype(backend.dtype))
        for _ in range(2)
    )
    y = backend.empty((size, size), backend.dtype)
    return 2 * size**3 / milliseconds_of(backend.gpu, lambda: ops.linear(y, x, w), 5) / 1e9


def write_rate(
    setting: GpuSetting, backend: CudaBackend, sequences: int, tokens: int
) -> dict[str, Any]:
    """Tokens a second, by the host's clock, of so many texts side by side of `tokens` each; the
    second time, when all is captured. Texts are long enough to come to a full context at most."""
    model = GPT(Weights(setting.dims, backend))
    model.params.load(setting.weights, backend)
    generator = GraphGenerator(model, backend, sequences)
    contexts = [np.array([s % setting.dims.vocab_size], np.int32) for s in range(sequences)]
    sampling = Sampling(tokens, temperature=0.8, never=setting.dims.vocab_size - 1)
    uniforms = PhiloxUniforms(setting.config.seed, range(sequences))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        written = sum(len(column) for column in generator.run(contexts, sampling, uniforms))
        seconds.append(time.perf_counter() - start)
    best = statistics.median(seconds[1:])
    return {
        "sequences": sequences,
        "tokens": written,
        "tokens_per_second": written / best,
        "us_per_position": 1e6 * best / tokens,
    }
