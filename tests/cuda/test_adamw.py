from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gpu_microgpt.arena import array_bytes
from gpu_microgpt.ops.cuda.adamw import adamw_scratch
from tests.cuda.machine import Machine, assert_twice_plain, bf16, normal, twice, wide
from tests.op_cases import planned_ops

SIZES = [1, 7, 31, 33, 1024, 20_003]  # the last is more than 6 blocks take at once
BETA1, BETA2, EPS, RATE, STEP = 0.85, 0.99, 1e-2, 0.05, 3


def one_multiprocessor(machine, dtype, scratch_bytes=0):
    ops = machine.ops(dtype, scratch_bytes)
    ops.device = replace(machine.device, multiprocessors=1)  # six blocks
    return ops


def check(machine, size, clip=0.3, weight_decay=0.1, dtype=bf16):
    """Against the formula in float64, and the reference in float32."""
    start, m0, g = (normal(np.float32, size, seed=s) for s in range(3))
    v0 = np.abs(normal(np.float32, size, seed=3))
    correction1, correction2 = 1 - BETA1**STEP, 1 - BETA2**STEP
    scalars = np.array([RATE, correction1, correction2, clip])
    settings = (BETA1, BETA2, EPS, weight_decay)
    ops = one_multiprocessor(machine, dtype)

    def run():
        p, m, v = (machine.array(a) for a in (start, m0, v0))
        copy = machine.blank(size, bf16) if dtype == bf16 else None
        on_device = machine.array(np.array([0, *scalars]))[1:]  # aligned for one number only
        ops.adamw(p, m, v, copy, machine.array(g), on_device, *settings)
        return (p, m, v) if copy is None else (p, m, v, copy)

    p, m, v, *copy = twice(machine, run)
    plain = [a.copy() for a in (start, m0, v0)]
    reference = planned_ops("float32", 1, vocab=size // 8 + 1)  # a model with that many weights
    reference.adamw(*plain, None, g, scalars, *settings)
    want_m = BETA1 * wide(m0) + (1 - BETA1) * clip * wide(g)
    want_v = BETA2 * wide(v0) + (1 - BETA2) * (clip * wide(g)) ** 2
    step = want_m / correction1 / (np.sqrt(want_v / correction2) + EPS)
    want_p = start - RATE * (step + weight_decay * wide(start))
    truths = (want_p, want_m, want_v)
    for got, simple, truth in zip((p, m, v), plain, truths, strict=True):
        assert_twice_plain(got, simple, truth)
    assert [c.tobytes() for c in copy] == [p.astype(bf16).tobytes()] * len(copy)


def check_norm(machine, size):
    grads = normal(np.float32, size)
    shapes = adamw_scratch(replace(machine.device, multiprocessors=1), size)
    ops = one_multiprocessor(machine, np.float32, sum(array_bytes(s, 8) for s in shapes))

    def run():
        norm = machine.blank(2, np.float64)[1:]
        ops.global_norm(norm, machine.array(grads))
        return (norm,)

    (norm,) = twice(machine, run)
    assert norm[0] == pytest.approx(np.sqrt((wide(grads) ** 2).sum()), rel=1e-7)


def check_clip(machine, norm, scale):
    out = machine.blank(4, np.float64)[3:]
    machine.ops(np.float32).clip_scale(out, machine.array(np.array([norm])), 2.0)
    assert machine.host(out)[0] == scale


def small(machine: Machine) -> None:
    check(machine, 1023)
    check(machine, 1030, dtype=np.float32)
    check_norm(machine, 2051)
    check_clip(machine, 5.0, 0.4)


def test_small(machine):
    small(machine)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize("size", SIZES)
def test_update_is_the_formula(one, size, clip, weight_decay):
    check(one, size, clip, weight_decay)
    check(one, size, clip, weight_decay, np.float32)


@pytest.mark.parametrize("size", [*SIZES, 50_001])
def test_norm_is_the_root_of_the_squares(one, size):
    check_norm(one, size)


CLIPS = [(4.0, 0.5), (2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (np.inf, 0.0), (np.nan, 1.0)]


@pytest.mark.parametrize(("norm", "scale"), CLIPS)
def test_clip_scale_is_the_references(machine, norm, scale):
    check_clip(machine, norm, scale)
    out = np.zeros(1)
    planned_ops("float64", 1).clip_scale(out, np.array([norm]), 2.0)
    assert out[0] == scale


def test_a_zero_gradient_moves_nothing(machine):
    p, (m, v, g) = np.ones(5, np.float32), (np.zeros(5, np.float32) for _ in range(3))
    p, m, v, g = (machine.array(a) for a in (p, m, v, g))
    scalars = machine.array(np.array([0.1, 0.1, 0.01, 1.0]))
    machine.ops(np.float32).adamw(p, m, v, None, g, scalars, 0.9, 0.99, 1e-8, 0.0)
    assert machine.host(p).tolist() == [1] * 5
    assert not machine.host(m).any()
    assert not machine.host(v).any()


def test_wrong_arguments_are_named(machine):
    x, scalars = machine.blank(8, np.float32), machine.blank(4, np.float64)
    settings = (scalars, 0.9, 0.99, 1e-8, 0.0)
    ops = machine.ops(bf16)
    with pytest.raises(ValueError, match=r"adamw: m: got float32 \(4,\), wanted float32 \(8,\)"):
        ops.adamw(x, x[:4], x, None, x, *settings)
    with pytest.raises(ValueError, match=r"adamw: copy: got float32 .* wanted bfloat16"):
        ops.adamw(x, x, x, x, x, *settings)
    with pytest.raises(ValueError, match=r"adamw: scalars: got float64 .* wanted float64"):
        ops.adamw(x, x, x, None, x, scalars[1:], *settings[1:])
    with pytest.raises(ValueError, match=r"adamw: copy: got float32 .* wanted None in float32"):
        machine.ops(np.float32).adamw(x, x, x, x, x, *settings)
    with pytest.raises(ValueError, match=r"global_norm: grads: got address .* multiple of 16"):
        ops.global_norm(scalars[:1], x[1:])
    with pytest.raises(ValueError, match="clip_scale: norm: got float32"):
        ops.clip_scale(scalars[:1], x[:1], 1.0)


def test_a_huge_gradient_is_clipped_before_it_is_squared(machine):
    g = normal(np.float32, 37)
    g[3] = 3e19  # its square is no float
    settings = (BETA1, BETA2, EPS, 0.0)
    for clip in (0.0, 1e-19):
        p, m, v = (machine.array(np.zeros(37, np.float32)) for _ in range(3))
        scalars = machine.array(np.array([RATE, 1 - BETA1, 1 - BETA2, clip]))
        machine.ops(np.float32).adamw(p, m, v, None, machine.array(g), scalars, *settings)
        for got in (p, m, v):
            assert np.isfinite(machine.host(got)).all()
        wanted = (1 - BETA2) * (clip * wide(g)) ** 2
        assert np.allclose(machine.host(v), wanted, rtol=1e-6, atol=1e-37)
