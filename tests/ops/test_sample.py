from __future__ import annotations

import random

import numpy as np
import pytest

from gpu_microgpt.generate import PhiloxUniforms
from tests.op_cases import normal, planned_ops

pytestmark = pytest.mark.usefixtures("implementation")

MANY = 20_000


def draw(dtype, logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    """Tokens drawn from rows of logits."""
    logits = np.array(logits, dtype)
    tokens = np.full(len(logits), -7, np.int32)
    ops = planned_ops(dtype, len(logits), vocab=logits.shape[1])
    ops.sample(tokens, logits, np.asarray(uniforms, np.float64), temperature, top_k, top_p)
    return tokens


def shares(dtype, logits, **settings):
    """How often each token comes, over evenly spread uniforms."""
    rows = np.tile(np.array(logits, dtype), (MANY, 1))
    tokens = draw(dtype, rows, (np.arange(MANY) + 0.5) / MANY, **settings)
    return np.bincount(tokens, minlength=len(logits)) / MANY


def test_temperature_zero_takes_the_first_of_the_largest(dtype):
    logits = [[0, 3, 3, 1], [5, 1, 1, 1], [-9, -8, -7, -6]]
    assert draw(dtype, logits, [0.9, 0.9, 0.0], temperature=0).tolist() == [1, 0, 3]


def test_each_row_has_its_uniform_and_its_logits(dtype):
    p = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]
    assert draw(dtype, np.log(p), [0.49, 0.49, 0.76]).tolist() == [0, 2, 2]


def test_uniforms_at_the_edges_stay_inside(dtype):
    logits = normal(dtype, 2, 5)
    assert draw(dtype, logits, [0.0, np.nextafter(1, 0)]).tolist() == [0, 4]


def test_a_uniform_on_a_boundary_takes_the_token_above(dtype):
    logits = [[0, 0, 0, 0], [0, 0, 0, 0], [-np.inf, 0, 0, 0]]
    assert draw(dtype, logits, [0.25, 0.75, 0.0]).tolist() == [1, 3, 1]


def test_many_unlikely_tokens_are_summed_in_float64(dtype):
    """Each is less than half a unit in the last place of the first one's 1, as float32 has it."""
    logits = np.full(60_000, np.log(5e-8))
    logits[0] = 0
    uniforms = [0.99, 0.9985, 0.9995]
    cumulative = np.exp(logits.astype(dtype).astype(np.float64)).cumsum()
    expected = np.searchsorted(cumulative, np.array(uniforms) * cumulative[-1])
    assert np.abs(draw(dtype, [logits] * 3, uniforms) - expected).max() <= 1
    assert expected[0] == 0 < expected[1] < expected[2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_shares_are_the_softmax(dtype, temperature):
    logits = np.array([0.3, -1, 2, 0, 1e-3])
    p = np.exp(logits / temperature)
    got = shares(dtype, logits, temperature=temperature)
    assert np.abs(got - p / p.sum()).max() < 2 / MANY


def test_choices_are_those_of_python(dtype):
    """As microgpt.py draws: random.choices(range(V), weights), which reads one random()."""
    weights = np.exp(normal("float64", 50, 27, scale=2.0))
    python, ours = random.Random(3), random.Random(3)
    expected = [python.choices(range(27), row)[0] for row in weights]
    uniforms = [ours.random() for _ in weights]
    assert draw(dtype, np.log(weights), uniforms).tolist() == expected


@pytest.mark.parametrize("top_k", [1, 2, 4, 5, 9])
def test_top_k_keeps_the_likeliest_in_proportion(dtype, top_k):
    p = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
    kept = np.where(np.argsort(np.argsort(-p)) < top_k, p, 0)
    got = shares(dtype, np.log(p), top_k=top_k)
    assert np.abs(got - kept / kept.sum()).max() < 2 / MANY


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, [1]), (0.5, [1]), (0.51, [1, 3]), (0.75, [1, 3]), (0.76, [1, 3, 0]), (1.0, range(4))],
)
def test_top_p_keeps_the_fewest_that_reach_it(dtype, top_p, kept):
    p = np.array([0.125, 0.5, 0.125, 0.25])  # exact in every dtype; of equals the first is kept
    expected = np.zeros(4)
    expected[list(kept)] = p[list(kept)]
    got = shares(dtype, np.log2(p) * np.log(2), top_p=top_p)
    assert np.abs(got - expected / expected.sum()).max() < 2 / MANY


def test_top_p_counts_what_top_k_left(dtype):
    p = np.array([0.4, 0.3, 0.2, 0.1])
    got = shares(dtype, np.log(p), top_k=2, top_p=0.5)  # 0.4 / 0.7 is enough alone
    assert got.tolist() == [1, 0, 0, 0]


def test_equal_logits_are_kept_by_id(dtype):
    assert shares(dtype, np.zeros(4), top_k=2).tolist() == [0.5, 0.5, 0, 0]
    logits = np.tile([1.0, 2.0], 500)  # of the 500 larger ones, those of the lowest 50 ids
    tokens = draw(dtype, [logits] * 99, np.linspace(0, 0.999, 99), top_k=50)
    assert set(tokens.tolist()) == set(range(1, 100, 2))


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_what_is_minus_infinity_never_comes(dtype, settings):
    got = shares(dtype, [-np.inf, 0, -np.inf, 1, -np.inf], **settings)
    assert got[[0, 2, 4]].tolist() == [0, 0, 0]
    assert (got[[1, 3]] > 0.2).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-40])
def test_a_low_temperature_is_greedy(dtype, temperature):
    assert draw(dtype, [[1, 4, 2]], [0.999], temperature=temperature).tolist() == [1]


def test_the_same_uniforms_give_the_same_tokens(dtype):
    logits, uniforms = normal(dtype, 31, 33), np.random.default_rng(0).random(31)
    settings = {"temperature": 0.8, "top_k": 20, "top_p": 0.95}
    first, second = (draw(dtype, logits, uniforms, **settings) for _ in range(2))
    assert np.array_equal(first, second)


def test_philox_draws_are_those_of_the_texts(dtype):
    """Each row has its own text and position; what stands beside it does not matter."""
    logits, seed = normal(dtype, 4, 33), 2**33 + 1
    numbers, positions = np.array([5, 0, 5, 31], np.int32), np.array([0, 300, 7, 7], np.int32)
    heat = (0.8, 20, 0.95)
    uniforms = [
        PhiloxUniforms(seed, [number])(at)[0] for number, at in zip(numbers, positions, strict=True)
    ]
    wanted = draw(dtype, logits, uniforms, *heat)
    for rows in (np.arange(4), np.array([3, 1])):
        tokens = np.full(len(rows), -7, np.int32)
        ops = planned_ops(dtype, len(rows), vocab=33)
        ops.sample_philox(tokens, logits[rows], seed, numbers[rows], positions[rows], *heat)
        assert tokens.tolist() == wanted[rows].tolist()
    assert len({round(u, 6) for u in uniforms}) == 4
