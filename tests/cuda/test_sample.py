from __future__ import annotations

import numpy as np
import pytest

from gpu_microgpt.rng import Stream, uniform
from tests.cuda.machine import DTYPES, Machine, normal
from tests.op_cases import planned_ops

NEAR = 1e-6  # of a boundary: where float32 weights may fall on either side
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0, "top_k": 5},
    {"top_k": 1},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 10**9, "top_p": 0.5},
    {"top_p": 1e-30},
    {"top_p": 0.93, "temperature": 1.5},
    {"temperature": 0.0},
]


def draws(machine, logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    """The kernel's tokens, rows packed; twice the same."""
    ops, given = machine.ops(logits.dtype), machine.array(logits)
    got = []
    for _ in range(2):
        tokens = machine.blank(len(logits), np.int32)
        ops.sample(tokens, given, machine.array(uniforms), temperature, top_k, top_p)
        got.append(machine.host(tokens).tolist())
    assert got[0] == got[1]
    return got[0]


def reference(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    tokens = np.empty(len(logits), np.int32)
    ops = planned_ops("float32", len(logits), vocab=logits.shape[1])
    copy = logits.astype(np.float32)  # bfloat16 logits are weighed in float32 too
    ops.sample(tokens, copy, uniforms, temperature, top_k, top_p)
    return tokens.tolist()


def clear(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    """Whether each row's draw and nucleus keep away from every boundary, in float64."""
    if temperature == 0:
        return np.ones(len(logits), bool)
    x = logits.astype(np.float64)
    weights = np.exp((x - x.max(-1, keepdims=True)) / temperature)
    order = np.argsort(-x, kind="stable", axis=-1)
    ranked = np.take_along_axis(weights, order, -1)
    ranked[:, top_k or ranked.shape[1] :] = 0
    ranked /= ranked.sum(-1, keepdims=True)
    before = ranked.cumsum(-1) - ranked
    doubtful = (np.abs(before - top_p) < NEAR) & (ranked > NEAR)  # a smaller one shifts nothing
    doubtful[:, 0] = False
    if top_p < 1:
        ranked[before >= top_p] = 0
    np.put_along_axis(weights, order, ranked, -1)
    sums = weights.cumsum(-1)
    near = np.abs(sums / sums[:, -1:] - uniforms[:, None]) < NEAR
    return ~doubtful.any(-1) & ~near.any(-1)


def check(machine, logits, settings, seed=0, wanted=1):
    """The reference's tokens, of the rows that are clear; at least `wanted` of them are."""
    uniforms = np.random.default_rng(seed).random(len(logits))
    rows = clear(logits, uniforms, **settings)
    assert rows.sum() >= wanted, settings
    got = np.array(draws(machine, logits, uniforms, **settings))
    expected = np.array(reference(logits, uniforms, **settings))
    assert got[rows].tolist() == expected[rows].tolist(), settings


def small(machine: Machine) -> None:
    for dtype in DTYPES.values():
        logits = normal(dtype, 3, 300, scale=2.0)
        logits[:, 5::7] = logits[:, 4:-1:7]  # ties
        check(machine, logits, {"top_k": 20, "top_p": 0.8})
        ties = np.zeros((2, 2500), dtype)  # past what the block sees at once
        assert draws(machine, ties, np.array([0.25, 0.999]), top_k=2400) == [600, 2397]
        ties[:, 0] = 3  # the others' sum has carries
        check(machine, ties, {"top_p": 0.9999})
        ulps = np.random.default_rng(0).permutation(100)  # logits that differ in the last bits
        close = 1 + (980 + ulps) * 2.0**-23 if dtype == np.float32 else 1 + ulps * 2.0**-7
        rows = np.tile(close.astype(dtype), (3, 1))
        largest = np.flatnonzero(ulps >= 40)[[3, 27, 57]].tolist()
        assert draws(machine, rows, np.array([0.06, 0.46, 0.96]), 1e6, top_k=60) == largest
    tokens = machine.blank(2, np.int32)
    numbers, places = np.array([[0, 7], [3, 2**31 - 1]], np.int32)
    ops, logits = machine.ops(np.float32), np.zeros((2, 100), np.float32)
    arrays = (machine.array(a) for a in (numbers, places))
    ops.sample_philox(tokens, machine.array(logits), 2**40 + 5, *arrays, 1.0, 0, 1.0)
    texts = zip(numbers, places, strict=True)
    want = [int(100 * uniform(2**40 + 5, Stream.SAMPLE, at, number)) for number, at in texts]
    assert machine.host(tokens).tolist() == want


def test_small(machine):
    small(machine)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [3, 27, 66, 1000])
def test_equals_the_reference(one, dtype, vocab, settings):
    logits = normal(DTYPES[dtype], 40, vocab, scale=2.0)
    check(one, logits, settings, wanted=35)


@pytest.mark.parametrize("settings", [{}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.999}], ids=str)
def test_a_large_vocabulary(one, dtype, settings):
    check(one, normal(DTYPES[dtype], 6, 50257, scale=2.5), settings, wanted=3)


def test_the_largest_vocabulary(one, dtype):
    """Sums of 65,536 equal weights fit, and each is drawn at its place."""
    logits = np.zeros((3, 65536), DTYPES[dtype])
    uniforms = (np.array([0, 40_000, 65_535]) + 0.5) / 65_536
    assert draws(one, logits, uniforms) == [0, 40_000, 65_535]
    assert draws(one, logits[:1], uniforms[2:], top_p=0.5) == [32_767]


def test_rows_further_apart(machine, dtype):
    """Aligned and not, and nothing read beside them."""
    for stride, first in ((40, 0), (41, 0), (40, 3)):
        wider = np.full((6, stride), np.inf, DTYPES[dtype])
        logits = wider[:, first : first + 33]
        logits[...] = normal(DTYPES[dtype], 6, 33)
        given = machine.array(wider)[:, first : first + 33]
        uniforms = np.random.default_rng(1).random(6)
        tokens = machine.blank(6, np.int32)
        ops = machine.ops(DTYPES[dtype])
        ops.sample(tokens, given, machine.array(uniforms), 1.0, 10, 0.9)
        assert machine.host(tokens).tolist() == reference(logits, uniforms, 1.0, 10, 0.9)


def test_equal_logits_are_kept_and_taken_by_id(machine, dtype):
    logits = np.tile(np.array([[1, 2, -0.0, 0.0, 2, 1]], DTYPES[dtype]), (4, 1))
    uniforms = np.array([0.0, 0.3, 0.7, 0.999])
    assert draws(machine, logits, uniforms, temperature=0.0) == [1] * 4
    assert draws(machine, logits, uniforms, top_k=1) == [1] * 4
    assert draws(machine, logits, uniforms, top_k=3, temperature=1e6) == [0, 0, 4, 4]
    assert draws(machine, logits, uniforms, top_k=5, temperature=1e6) == [0, 1, 4, 5]
    assert draws(machine, logits[:, 2:4], uniforms, top_k=1) == [0] * 4  # -0 is 0
    zeros = np.zeros((4, 8), DTYPES[dtype])
    assert draws(machine, zeros, uniforms, top_p=0.5) == [0, 1, 2, 3]
    assert draws(machine, zeros, uniforms, top_k=4, top_p=0.5) == [0, 0, 1, 1]


def test_minus_infinity_never_comes(machine, dtype):
    logits = np.full((5, 70), -np.inf, DTYPES[dtype])
    logits[:, 3], logits[:, 69] = 0, 1
    uniforms = np.array([0.0, 0.2, 0.3, 0.9, 1 - 2.0**-53])
    for settings in ({}, {"top_k": 50}, {"top_p": 0.99}):
        assert draws(machine, logits, uniforms, **settings) == [3, 3, 69, 69, 69]
    assert draws(machine, logits, uniforms, temperature=0) == [69] * 5


def test_a_low_temperature_is_greedy(machine, dtype):
    logits = np.array([[1, 4, 2]], DTYPES[dtype])
    for temperature in (1e-3, 2e-6, 1e-40):
        assert draws(machine, logits, np.array([0.999]), temperature=temperature) == [1]


def test_rows_without_a_distribution_give_some_token(one, dtype):
    """A model that has diverged: an id of the vocabulary all the same."""
    logits = np.zeros((5, 40), DTYPES[dtype])
    logits[0], logits[1, 7], logits[2] = -np.inf, np.inf, np.nan
    logits[3, ::2], logits[4, ::2] = np.nan, -np.nan
    for settings in SETTINGS:
        tokens = draws(one, logits, np.full(5, 0.7), **settings)
        assert all(0 <= token < 40 for token in tokens), settings


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_philox_equals_the_reference(one, seed):
    """Each row has the draw of its own text and position."""
    numbers = np.array([0, 1, 1, 0, 31, 2**31 - 1, 5, 6], np.int32)
    positions = np.array([0, 0, 1, 255, 256, 9, 2**31 - 1, 1], np.int32)
    logits = normal(np.float32, 8, 1000)
    wanted = np.empty(8, np.int32)
    planned_ops("float32", 8, vocab=1000).sample_philox(
        wanted, logits.copy(), seed, numbers, positions, 0.9, 100, 0.95
    )
    tokens = one.blank(8, np.int32)
    given = [one.array(a) for a in (numbers, positions)]
    one.ops(np.float32).sample_philox(tokens, one.array(logits), seed, *given, 0.9, 100, 0.95)
    assert one.host(tokens).tolist() == wanted.tolist()
    assert len(set(wanted.tolist())) > 4


def test_wrong_arguments_are_named(machine):
    ops, logits = machine.ops(np.float32), machine.blank((4, 8), np.float32)
    tokens, uniforms = machine.blank(4, np.int32), machine.blank(4, np.float64)
    heat = (1.0, 0, 1.0)
    with pytest.raises(ValueError, match=r"sample: tokens: got int32 \(3,\), wanted int32 \(4,\)"):
        ops.sample(tokens[:3], logits, uniforms, *heat)
    with pytest.raises(ValueError, match=r"sample: uniforms: got float32 \(4,\), wanted float64"):
        ops.sample(tokens, logits, uniforms.astype(np.float32), *heat)
    with pytest.raises(ValueError, match=r"sample: logits: got strides .* wanted rows of neigh"):
        ops.sample(machine.blank(8, np.int32), logits.T, machine.blank(8, np.float64), *heat)
    with pytest.raises(ValueError, match="sample: logits: got 65537 tokens, wanted 1 to 65536"):
        ops.sample(tokens, machine.blank((4, 65537), np.float32), uniforms, *heat)
    with pytest.raises(ValueError, match=r"sample_philox: numbers: got int64 \(4,\), wanted int32"):
        ops.sample_philox(tokens, logits, 1, tokens.astype(np.int64), tokens, *heat)
