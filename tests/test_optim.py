from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.config import OptimizerConfig
from gpu_microgpt.dims import Dims
from gpu_microgpt.optim import Optimizer
from gpu_microgpt.params import Params, Weights

DIMS = Dims(2, 3, 9, 5, 7)  # odd sizes: many gaps in the flat buffers
STEPS = 7

ADAM = OptimizerConfig(lr=0.01, betas=(0.85, 0.99))
SETTINGS = {
    "adam": ADAM,
    "adam, clipped": ADAM.model_copy(update={"grad_clip": 0.5}),
    "adam, a clip never reached": ADAM.model_copy(update={"grad_clip": 1e9}),
    "adam, large eps": ADAM.model_copy(update={"eps": 0.1}),
    "adamw": ADAM.model_copy(update={"name": "adamw", "weight_decay": 0.1}),
    "adamw, clipped": ADAM.model_copy(
        update={"name": "adamw", "weight_decay": 0.1, "grad_clip": 0.5}
    ),
    "no momentum": ADAM.model_copy(update={"betas": (0.0, 0.0)}),
}
settings = pytest.mark.parametrize("name", SETTINGS)
dtypes = pytest.mark.parametrize("dtype", ["fp32", "fp64"])


def workers(backend: NumpyBackend, count: int):
    size = backend.workspace_bytes(DIMS, 1)
    return [backend.ops(np.full(size, 0xFF, np.uint8)) for _ in range(count)]


def rates(step: int) -> float:
    return 0.01 * (1 - step / 10)


def draws(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = {name: x.shape for name, x in Params(DIMS, NumpyBackend()).named.items()}
    values = {name: draw.normal(0, scale, shape) for name, shape in shapes.items()}
    return {name: x.astype(np.float32) for name, x in values.items()}


def run(config: OptimizerConfig, dtype: str, count: int = 1):
    """Parameters, optimizer and gradients after a few steps, and every norm."""
    backend = NumpyBackend(dtype)
    params, grads = Weights(DIMS, backend), Params(DIMS, backend)
    params.load(draws(0), backend)
    optimizer, norms = Optimizer(config, params, backend), []
    with backend:
        for step in range(1, STEPS + 1):
            grads.load(draws(step, scale=0.1 * step), backend)
            optimizer.update(workers(backend, count), grads, rates(step), step)
            norms.append(float(optimizer.norm[0]))
    return params, optimizer, grads, norms


def textbook(config: OptimizerConfig):
    """Kingma & Ba's algorithm 1, decay as in Loshchilov & Hutter's algorithm 2, name by name."""
    weights = {name: x.astype(np.float64) for name, x in draws(0).items()}
    m = {name: np.zeros_like(x) for name, x in weights.items()}
    v = {name: np.zeros_like(x) for name, x in weights.items()}
    (beta1, beta2), norms = config.betas, []
    for t in range(1, STEPS + 1):
        grads = {name: x.astype(np.float64) for name, x in draws(t, scale=0.1 * t).items()}
        norms.append(float(np.sqrt(sum((g**2).sum() for g in grads.values()))))
        clip = min(1.0, config.grad_clip / norms[-1]) if config.grad_clip else 1.0
        for name, weight in weights.items():
            g = clip * grads[name]
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            mean, square = m[name] / (1 - beta1**t), v[name] / (1 - beta2**t)
            step = mean / (np.sqrt(square) + config.eps)
            weights[name] = weight - rates(t) * (step + config.weight_decay * weight)
    return weights, m, v, norms


@dtypes
@settings
def test_updates_are_the_textbooks(name, dtype):
    params, optimizer, _, norms = run(SETTINGS[name], dtype)
    *expected, expected_norms = textbook(SETTINGS[name])
    tolerance = 1e-5 if dtype == "fp32" else 1e-13
    assert norms == pytest.approx(expected_norms, rel=tolerance)
    for ours, theirs in zip((params, optimizer.m, optimizer.v), expected, strict=True):
        for key, wanted in theirs.items():
            error = np.abs(ours.named[key] - wanted).max()
            assert error <= tolerance * np.abs(wanted).max(), key


def test_a_clip_is_reached_in_these_settings():
    norms = textbook(SETTINGS["adam, clipped"])[3]
    assert min(norms) > 0.5


@dtypes
@settings
def test_gaps_stay_zero(name, dtype):
    params, optimizer, grads, _ = run(SETTINGS[name], dtype)
    used = Params(DIMS, NumpyBackend(dtype))
    for view in used.named.values():
        view.fill(1)
    gaps = used.flat == 0
    assert gaps.any()
    for buffers in (params, optimizer.m, optimizer.v, grads):
        assert not buffers.flat[gaps].any()


@pytest.mark.parametrize("count", [2, 3, 7])
@dtypes
def test_any_number_of_workers_gives_the_same_bits(dtype, count):
    (p1, o1, _, n1), (p2, o2, _, n2) = (
        run(SETTINGS["adamw, clipped"], dtype, number) for number in (1, count)
    )
    assert n1 == n2
    for a, b in ((p1, p2), (o1.m, o2.m), (o1.v, o2.v)):
        assert a.flat.tobytes() == b.flat.tobytes()


def test_the_first_step_is_the_rate_whatever_the_gradient():
    """With both biases corrected m / sqrt(v) is 1 or -1 at step 1."""
    backend = NumpyBackend("fp64")
    params, grads = Weights(DIMS, backend), Params(DIMS, backend)
    draw = np.random.default_rng(0)
    for view in grads.named.values():
        view[...] = draw.choice([-100, -1e-3, 1e-3, 100], view.shape)
    Optimizer(ADAM, params, backend).update(workers(backend, 1), grads, 0.25, 1)
    for name, view in params.named.items():
        assert view == pytest.approx(-0.25 * np.sign(grads.named[name]), rel=1e-4)


def test_gradients_and_norm_are_left_unclipped():
    _, optimizer, grads, norms = run(SETTINGS["adam, clipped"], "fp64")
    expected = draws(STEPS, scale=0.1 * STEPS)
    assert all(np.array_equal(grads.named[name], g) for name, g in expected.items())
    assert norms[-1] == pytest.approx(float(np.linalg.norm(grads.flat)), rel=1e-12)
    assert optimizer.scalars[3] == pytest.approx(0.5 / norms[-1])
