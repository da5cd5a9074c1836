"""Learning-rate schedules against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest

from gpu_microgpt.config import Config, ScheduleConfig
from gpu_microgpt.schedule import learning_rate


def test_linear_is_microgpts_to_the_bit() -> None:
    config = Config.load("microgpt")
    for step in range(1000):
        rate = learning_rate(config.schedule, config.optimizer.lr, step, 1000)
        assert rate == 0.01 * (1 - step / 1000)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_warmup_climbs_to_the_peak_in_equal_steps(name: str) -> None:
    schedule = ScheduleConfig.model_validate({"name": name, "warmup_fraction": 0.1})
    rates = [learning_rate(schedule, 3.0, step, 100) for step in range(12)]
    assert rates[:10] == pytest.approx([0.3 * (step + 1) for step in range(10)], rel=1e-15)
    assert rates[10] == 3.0  # the decay begins at the peak
    assert rates[11] == 3.0 if name == "constant" else rates[11] < 3.0


def test_constant_stays() -> None:
    assert {learning_rate(ScheduleConfig(), 0.5, step, 10) for step in range(10)} == {0.5}


def test_cosine_by_its_formula() -> None:
    schedule = ScheduleConfig(name="cosine", warmup_fraction=0.1, min_lr=1e-4)
    for step in range(200, 2000, 100):
        wave = 0.5 * (1 + math.cos(math.pi * (step - 200) / 1800))
        expected = 1e-4 + (1e-3 - 1e-4) * wave
        assert learning_rate(schedule, 1e-3, step, 2000) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("min_lr", [0.0, 0.25])
def test_decay_falls_at_every_step_and_ends_at_the_floor(name: str, min_lr: float) -> None:
    schedule = ScheduleConfig.model_validate({"name": name, "min_lr": min_lr})
    rates = [learning_rate(schedule, 1.0, step, 1000) for step in range(1000)]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert min_lr < rates[-1] < min_lr + 0.0011
    assert rates[500] == pytest.approx((1 + min_lr) / 2)  # both are half-way down


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_short_and_all_warmup_runs_have_positive_rates(total: int) -> None:
    for fraction in (0.0, 0.1, 0.5, 1.0):
        schedule = ScheduleConfig(name="cosine", warmup_fraction=fraction)
        rates = [learning_rate(schedule, 1.0, step, total) for step in range(total)]
        assert all(0 < rate <= 1 for rate in rates)
