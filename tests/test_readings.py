"""Figures are asked for in time, read late, and none is lost: seen from an engine whose figures
arrive only when they are waited for, or at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from gpu_microgpt.config import Config
from gpu_microgpt.dims import Dims
from gpu_microgpt.readings import Readings

RING, BATCH, ACCUMULATED = 4, 3, 2
DIMS = Dims(1, 2, 8, 16, 27)


@dataclass
class Figures:
    engine: Engine
    values: np.ndarray

    def done(self) -> bool:
        return self.engine.prompt

    def records(self) -> np.ndarray:
        self.engine.under_way -= 1
        return self.values

    def ms_per_step(self) -> float:
        return 7.0


@dataclass
class Engine:
    """Step s has loss s, norm 10 s and 100 s targets."""

    prompt: bool
    ring: int = RING
    under_way: int = 0
    paused: int = 0
    now: np.ndarray = field(default_factory=lambda: np.full((RING, 3), np.nan))

    def train(self, step: int, count: int = 1) -> None:
        for s in range(step, step + count):
            self.now[s % RING] = s, 10 * s, 100 * s

    def ask(self) -> Figures:
        self.under_way += 1
        return Figures(self, self.now.copy())

    def pause(self) -> None:
        assert not self.under_way
        self.paused += 1


@dataclass
class Report:
    """What it was told."""

    checked: list[Any] = field(default_factory=list)
    counted: list[Any] = field(default_factory=list)
    trained: list[Any] = field(default_factory=list)

    def check(self, steps: Any, losses: Any, norms: Any, rate: Any, advice: Any) -> None:
        for s, loss, norm in zip(steps, losses, norms, strict=True):
            self.checked.append((s, loss, norm, rate(s), advice()))

    def count(self, *figures: float) -> None:
        self.counted.append(figures)

    def train(self, step: int, norm: float, rate: float) -> None:
        self.trained.append((step, norm, rate))


def readings_of(engine: Engine, interval: int, start: int = 0) -> tuple[Readings, Report]:
    overrides = [f"train.batch_size={BATCH}", f"train.grad_accum={ACCUMULATED}"]
    config = Config.load("names", [*overrides, f"train.log_interval={interval}"])
    report: Any = Report()
    own: Any = engine
    return Readings(
        own, report, config, DIMS, start, 19, lambda step: step / 8, lambda: "help"
    ), report


def do(steps: int, engine: Engine, readings: Readings) -> None:
    """So many from the start."""
    for step in range(1, steps + 1):
        engine.train(step)
        readings.after(step)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("interval", [1, 3, 4, 7])
@pytest.mark.parametrize("start", [0, 5])
def test_every_step_is_told_once_in_order(start, interval, prompt):
    engine = Engine(prompt)
    readings, report = readings_of(engine, interval, start)
    steps = range(start + 1, 20)
    for step in steps:
        engine.train(step)
        readings.after(step)
        assert engine.under_way <= 1  # never two: the host does not run away from the device
        if prompt and step % interval == 0:
            assert report.checked[-1][0] == step
    readings.flush(19)
    assert engine.under_way == 0
    assert report.checked == [(s, s, 10 * s, s / 8, "help") for s in steps]
    each = [100 * s / (BATCH * ACCUMULATED) for s in steps]  # rows of a sequence
    flops = [DIMS.train_flops(100 * s, length) for s, length in zip(steps, each, strict=True)]
    assert sum(count for count, *_ in report.counted) == len(steps)
    assert sum(tokens for _, tokens, *_ in report.counted) == sum(100 * s for s in steps)
    assert sum(f for _, _, f, _ in report.counted) == pytest.approx(sum(flops), rel=1e-14)
    assert {milliseconds for *_, milliseconds in report.counted} == {7.0}
    logged = [s for s in steps if s % interval == 0 or s == 19]
    assert report.trained == [(s, 10 * s, s / 8) for s in logged]


@pytest.mark.parametrize("interval", [1, 3, 4, 7])
@pytest.mark.parametrize("stride", [1, 2, 5, 64])
def test_many_steps_together_end_where_it_is_time_to_ask(stride, interval):
    engine = Engine(prompt=False)
    readings, report = readings_of(engine, interval)
    step = 0
    while step < 19:
        count = min(stride, 19 - step, readings.ahead(step))
        assert 1 <= count <= RING
        engine.train(step + 1, count)
        step += count
        readings.after(step)
    readings.flush(19)
    assert [(s, loss) for s, loss, *_ in report.checked] == [(s, s) for s in range(1, 20)]
    assert report.trained == [
        (s, 10 * s, s / 8) for s in range(1, 20) if not s % interval or s == 19
    ]


def test_what_is_late_is_not_waited_for():
    engine = Engine(prompt=False)
    readings, report = readings_of(engine, 3)
    do(5, engine, readings)
    assert engine.under_way == 1
    assert not report.checked
    engine.train(6)
    readings.after(6)  # asks again, and so reads what it asked for before
    assert [step for step, *_ in report.checked] == [1, 2, 3]


def test_flush_tells_all_and_stops_the_clock():
    engine = Engine(prompt=False)
    readings, report = readings_of(engine, 3)
    do(4, engine, readings)
    readings.flush(4)
    assert [step for step, *_ in report.checked] == [1, 2, 3, 4]
    assert engine.paused == 1
    readings.flush(4)  # nothing new
    assert len(report.checked) == 4
