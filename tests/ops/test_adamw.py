from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.ops.reference import ReferenceOps
from tests.op_cases import assert_close, blank, normal, planned_ops, twice

pytestmark = pytest.mark.usefixtures("implementation")

SIZES = [1, 63, 262_144, 262_145, 600_001]  # blocks of the flat buffer: part of one, one, several


@pytest.mark.parametrize("size", [1, 33, 262_144, 300_001])
def test_norm_is_the_root_of_the_squares(dtype, size):
    grads = normal(dtype, size)

    def run():
        norm = blank("float64", 1)
        planned_ops(dtype, 1).global_norm(norm, grads)
        return (norm,)

    (norm,) = twice(run)
    expected = np.sqrt((grads.astype(np.float64) ** 2).sum())
    assert norm[0] == pytest.approx(expected, rel=1e-6 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize(("norm", "scale"), [(4.0, 0.5), (2.0, 1.0), (1.0, 1.0), (0.0, 1.0)])
def test_clip_scale_never_enlarges(norm, scale):
    out = blank("float64", 1)
    planned_ops("float64", 1).clip_scale(out, np.array([norm]), 2.0)
    assert out[0] == scale


@pytest.mark.parametrize("eps", [1e-8, 1e-38, 1e-40])
def test_weights_without_gradients_stay_however_small_eps_is(dtype, eps):
    p, (m, v, g) = np.ones(40, dtype), np.zeros((3, 40), dtype)
    scalars = np.array([0.1, 0.15, 0.001, 1.0])
    planned_ops(dtype, 1).adamw(p, m, v, None, g, scalars, 0.85, 0.999, eps, 0.0)
    assert (p == 1).all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize("size", SIZES)
def test_update_is_the_formula(dtype, size, clip, weight_decay):
    ops = planned_ops(dtype, 1, vocab=size // 8 + 1)  # a model with that many weights
    start, m0, g = (normal(dtype, size, seed=s) for s in range(3))
    v0 = np.abs(normal(dtype, size, seed=3))
    beta1, beta2, eps, rate, t = 0.85, 0.99, 1e-2, 0.05, 3
    scalars = np.array([rate, 1 - beta1**t, 1 - beta2**t, clip])

    def run():
        p, m, v = (blank(dtype, size) for _ in range(3))
        copy = blank("float32", size) if isinstance(ops, ReferenceOps) else None
        p[...], m[...], v[...] = start, m0, v0
        ops.adamw(p, m, v, copy, g, scalars, beta1, beta2, eps, weight_decay)
        return (p, m, v) if copy is None else (p, m, v, copy)

    p, m, v, *copies = twice(run)
    wide = clip * g.astype(np.float64)
    expected_m = beta1 * m0 + (1 - beta1) * wide
    expected_v = beta2 * v0 + (1 - beta2) * wide**2
    mean, square = expected_m / (1 - beta1**t), expected_v / (1 - beta2**t)
    step = mean / (np.sqrt(square) + eps) + weight_decay * start.astype(np.float64)
    assert_close(m, expected_m)
    assert_close(v, expected_v)
    assert_close(p, start - rate * step)
    for copy in copies:
        assert np.array_equal(copy, p.astype(np.float32))


def test_a_zero_gradient_moves_nothing(dtype):
    ops = planned_ops(dtype, 1)
    p, m, v, g = np.ones(5, dtype), *(np.zeros(5, dtype) for _ in range(3))
    ops.adamw(p, m, v, None, g, np.array([0.1, 0.1, 0.01, 1.0]), 0.9, 0.99, 1e-8, 0.0)
    assert p.tolist() == [1] * 5
    assert not m.any()
    assert not v.any()


def test_a_huge_gradient_is_clipped_before_it_is_squared(dtype):
    ops = planned_ops(dtype, 1, vocab=8)
    largest = float(np.finfo(dtype).max)
    g = np.array([0.5 * largest, 1, -1, 0], dtype)
    for clip in (0.0, 2 / largest):
        p, m, v = (np.zeros(4, dtype) for _ in range(3))
        ops.adamw(p, m, v, None, g, np.array([0.1, 0.1, 0.1, clip]), 0.9, 0.99, 1e-8, 0.0)
        assert all(np.isfinite(a).all() for a in (p, m, v))
        assert np.isclose(v[0], 0.01 * (clip * 0.5 * largest) ** 2)
