from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.config import Config
from gpu_microgpt.dims import Dims
from gpu_microgpt.ops.cuda.step import SCHEDULES, UpdatePlan
from gpu_microgpt.optim import Optimizer
from gpu_microgpt.params import Params
from gpu_microgpt.schedule import learning_rate
from tests.cuda.machine import Machine, normal
from tests.model_cases import make_model
from tests.op_cases import planned_ops

LOSS, TARGETS, NORM = 301.25, 96, 40.0
LR, RING = 0.03, 5
OF_POWERS = {"rtol": 1e-14, "atol": 5e-16}  # 1 - pow: that is off by up to two units, and cancels


def config_of(schedule="constant", warmup=0.0, min_lr=0.0, grad_accum=1, **optimizer):
    values = {
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 8},
        "data": {"source": "given"},
        "train": {"steps": 10, "batch_size": 4, "grad_accum": grad_accum},
        "optimizer": {"lr": LR, "betas": [0.9, 0.999]} | optimizer,
        "schedule": {"name": schedule, "warmup_fraction": warmup, "min_lr": min_lr},
    }
    return Config.from_dict(values)


def wanted(config, total, step, targets=TARGETS, norm=NORM):
    """The scalars, and the norm of the mean gradient, by the Python of a step on the host."""
    rate = learning_rate(config.schedule, config.optimizer.lr, step - 1, total)
    beta1, beta2 = config.optimizer.betas
    mean_norm, clip = np.array([norm / targets]), np.ones(1)
    if config.optimizer.grad_clip:
        planned_ops("float64", 1).clip_scale(clip, mean_norm, config.optimizer.grad_clip)
    scalars = [rate, 1 - beta1**step, 1 - beta2**step, clip[0] / targets]
    return scalars, mean_norm[0]


def update(machine, config, total, step, loss=LOSS, targets=TARGETS, norm=NORM):
    """Scalars and records after the update of this step, which left loss and targets at 0."""
    plan = UpdatePlan.of(config, total)
    counter = np.array([0, step * config.train.grad_accum])
    sums = [machine.array(np.array([0, x])) for x in (loss, targets, norm)]
    sums = [s[1:] for s in sums]  # aligned for one number only
    scalars = machine.blank(5, np.float64)[1:]
    records = machine.blank((RING, 3), np.float64)
    ops = machine.ops(np.float32)
    ops.update_scalars(scalars, records, *sums, machine.array(counter)[1:], plan)
    assert machine.host(sums[0]).tolist() == machine.host(sums[1]).tolist() == [0]
    return machine.host(scalars), machine.host(records)


def check(machine, config, total, step, targets=TARGETS, norm=NORM):
    """Against the host. 1 - beta^s, and the cosine's 1 + cos at its end, are small differences of
    numbers near 1, whose last bits a GPU's library may round otherwise."""
    scalars, records = update(machine, config, total, step, targets=targets, norm=norm)
    truth, mean_norm = wanted(config, total, step, targets, norm)
    room = 1e-15 * LR if config.schedule.name == "cosine" else 0.0
    np.testing.assert_allclose(scalars[0], truth[0], rtol=1e-14, atol=room)
    np.testing.assert_allclose(scalars[1:3], truth[1:3], **OF_POWERS)
    np.testing.assert_allclose(scalars[3], truth[3], rtol=1e-14)
    record = [LOSS / targets, mean_norm, targets]
    np.testing.assert_allclose(records[step % RING], record, rtol=1e-14)
    others = np.delete(records, step % RING, 0)
    assert others.tobytes() == b"\xff" * others.nbytes  # as they were


def check_advance(machine):
    """Three micro-batches."""
    counter, targets = 6, 2**40
    on_device = [machine.array(np.array([0, n])) for n in (counter, targets)]
    ops = machine.ops(np.float32)
    for count in (32, 0, 2**31 - 1):
        counted = machine.array(np.array([0, count], np.int32))[1:]
        ops.advance(on_device[0][1:], on_device[1][1:], counted)
    assert machine.host(on_device[0]).tolist() == [0, counter + 3]
    assert machine.host(on_device[1]).tolist() == [0, targets + 31 + 2**31]


def small(machine: Machine) -> None:
    check_advance(machine)
    for schedule in SCHEDULES:
        config = config_of(schedule, 0.2, 0.001, grad_accum=3, grad_clip=0.25)
        for step in (1, 2, 3, 4, 10):
            check(machine, config, 10, step)
    check_no_targets(machine)


def check_no_targets(machine):
    """Rate and clip 0; the record says NaN."""
    config = config_of("linear", grad_clip=1.0, weight_decay=0.1, name="adamw")
    scalars, records = update(machine, config, 10, 2, loss=0.0, targets=0, norm=0.0)
    assert scalars[[0, 3]].tolist() == [0, 0]
    np.testing.assert_allclose(scalars[1:3], [1 - 0.9**2, 1 - 0.999**2], **OF_POWERS)
    assert np.isnan(records[2][:2]).all()
    assert records[2][2] == 0
    return scalars


def test_small(machine):
    small(machine)


@pytest.mark.parametrize("warmup", [0.0, 0.013, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rate_is_the_schedules(one, schedule, warmup):
    for total, min_lr in ((1, 0.0), (2, 0.0), (7, 0.01), (1000, 0.0), (1000, 0.01)):
        config = config_of(schedule, warmup, min_lr)
        ramp = round(warmup * total)
        edges = (1, 2, ramp - 1, ramp, ramp + 1, ramp + 2, total // 2, total - 1, total)
        for step in sorted({s for s in edges if 1 <= s <= total}):
            check(one, config, total, step)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_thousand_million_steps(one, schedule):
    config = config_of(schedule, 0.25, betas=[0.0, 0.999999999])
    config = config.model_copy(update={"train": config_of(grad_accum=5).train})
    for step in (2**29 - 1, 2**29 + 1, 2**30 + 12345, 2**31 - 1, 2**31):
        check(one, config, 2**31, step)


def test_rates_fall_over_a_whole_run(one):
    config = config_of("cosine", 0.1, 0.001)
    rates = [update(one, config, 60, step)[0][0] for step in range(1, 61)]
    assert np.diff(rates[:6]).min() > 0
    assert np.diff(rates[6:]).max() < 0


CLIPS = [(4.0, 0.5), (2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (np.inf, 0.0), (np.nan, 1.0)]


@pytest.mark.parametrize(("norm", "scale"), CLIPS)
def test_clip_is_the_references_by_targets(machine, norm, scale):
    config = config_of(grad_clip=2.0)
    check(machine, config, 10, 3, norm=norm * TARGETS)
    check(machine, config, 10, 3, targets=2**40 + 1, norm=norm * 2.0**40)
    scalars, _ = update(machine, config, 10, 3, norm=norm * TARGETS)
    assert scalars[3] == scale / TARGETS
    scalars, _ = update(machine, config_of(grad_clip=0.0), 10, 3, norm=norm * TARGETS)
    assert scalars[3] == 1 / TARGETS  # never clipped


@pytest.mark.parametrize("max_norm", [1e-13, 1e-300])
def test_clip_far_below_any_norm(machine, max_norm):
    """Where the reference bounds the norm, and a NaN is not to become that bound."""
    config = config_of(grad_clip=max_norm)
    for norm in (0.0, 1e-12, 1e-8, np.nan):
        check(machine, config, 10, 1, norm=norm)


def test_is_what_the_optimizer_makes_of_mean_gradients(one):
    config = config_of("cosine", 0.1, grad_clip=0.5)
    backend, model = make_model(Dims(1, 1, 4, 8, 5))
    optimizer = Optimizer(config.optimizer, model.params, backend)
    grads = Params(model.dims, backend)
    grads.flat[...] = normal(np.float64, len(grads.flat))
    ops = planned_ops("float64", 1, channels=8, vocab=40)
    for step in (1, 2, 7):
        rate = learning_rate(config.schedule, LR, step - 1, 10)
        optimizer.update([ops], grads, rate, step)
        norm = float(optimizer.norm[0]) * TARGETS  # of sums
        scalars, records = update(one, config, 10, step, norm=norm)
        scalars[3] *= TARGETS
        np.testing.assert_allclose(scalars, optimizer.scalars, rtol=1e-14, atol=5e-16)
        assert records[step % RING][1] == pytest.approx(optimizer.norm[0], rel=1e-14)
        assert 0 < scalars[3] < 1


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_no_number_is_recorded_as_such(machine, loss):
    _, records = update(machine, config_of(), 10, 4, loss=loss)
    assert not np.isfinite(records[4][0])


def test_without_targets_no_weight_moves(machine):
    scalars = machine.array(check_no_targets(machine))
    start, m, v = (np.abs(normal(np.float32, 37, seed=s)) for s in range(3))
    p, grads = machine.array(start), machine.array(np.zeros(37, np.float32))
    moments = machine.array(m), machine.array(v)
    ops = machine.ops(np.float32)
    ops.adamw(p, *moments, None, grads, scalars, 0.9, 0.999, 1e-8, 0.1)
    assert np.array_equal(machine.host(p), start)


def test_the_plan_is_the_settings(machine):
    config = config_of("cosine", 0.1, 0.001, grad_accum=3, grad_clip=0.5, betas=[0.8, 0.9])
    plan = UpdatePlan.of(config, 1234)
    assert plan == UpdatePlan(3, 1234, "cosine", 123, LR, 0.001, 0.8, 0.9, 0.5)


def test_wrong_arguments_are_named(machine):
    ops, plan = machine.ops(np.float32), UpdatePlan.of(config_of(), 10)
    scalars, records = machine.blank(4, np.float64), machine.blank((RING, 3), np.float64)
    real, word = machine.blank(1, np.float64), machine.blank(1, np.int64)
    good = {"scalars": scalars, "records": records} | dict.fromkeys(("loss", "norm"), real)
    good |= dict.fromkeys(("targets", "counter"), word)
    for name, wrong, message in (
        ("scalars", scalars[:3], r"got float64 \(3,\), wanted float64 \(4,\)"),
        ("records", records[:, :2], r"got float64 \(5, 2\), wanted float64 \(5, 3\)"),
        ("records", records[:0], r"got float64 \(0, 3\), wanted float64 \(1, 3\)"),
        ("records", records[::2], "got strides"),
        ("records", scalars, r"got shape \(4,\), wanted rows and columns"),
        ("loss", machine.blank(1, np.float32), r"got float32 \(1,\), wanted float64 \(1,\)"),
        ("targets", machine.blank(1, np.int32), r"got int32 \(1,\), wanted int64 \(1,\)"),
        ("norm", scalars, r"got float64 \(4,\), wanted float64 \(1,\)"),
        ("counter", real, r"got float64 \(1,\), wanted int64 \(1,\)"),
        ("loss", np.zeros(1), "got numpy.ndarray, wanted .*, on the device"),
    ):
        with pytest.raises(ValueError, match=f"update_scalars: {name}: {message}"):
            ops.update_scalars(**good | {name: wrong}, plan=plan)
    with pytest.raises(ValueError, match=r"advance: targets: got float64 .*, wanted int64"):
        ops.advance(word, real, machine.blank(1, np.int32))
    with pytest.raises(ValueError, match=r"advance: count: got int64 \(1,\), wanted int32 \(1,\)"):
        ops.advance(word, word, word)
