"""The compiled operations by rows against the reference at awkward sizes, in memory that ends where
the arrays do."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled operations need Numba")

from gpu_microgpt.ops.cpu import CompiledOps
from gpu_microgpt.ops.cpu.code import HAS_MXCSR
from gpu_microgpt.ops.cpu.sample import keep_likely_row
from gpu_microgpt.ops.reference import ReferenceOps
from tests.guard_page import up_to_the_edge
from tests.op_cases import assert_close, normal, some_targets

ROWS = [1, 6]
CHANNELS = [1, 7, 16, 33, 128, 384]
VOCABS = [1, 3, 27, 66, 1000, 9000]
SCRATCH = 1 << 21


def both(name, outputs, *inputs):
    """What the reference and the compiled operation make of the same arrays: two lists of outputs.

    outputs: arrays as they are before. All arrays end with their memory.
    """
    results = []
    arrays = [*outputs, *(a for a in inputs if isinstance(a, np.ndarray))]
    dtype = min((a.dtype for a in arrays if a.dtype.kind == "f"), key=lambda kind: kind.itemsize)
    scratch = np.full(SCRATCH, 0xFF, np.uint8)
    for ops in (ReferenceOps(np, scratch), CompiledOps(np, scratch, dtype)):
        made = [up_to_the_edge(a) for a in outputs]
        given = [up_to_the_edge(a) if isinstance(a, np.ndarray) else a for a in inputs]
        with np.errstate(all="ignore"):
            getattr(ops, name)(*made, *given)
        results.append(made)
    return results


def compare(name, outputs, *inputs):
    """They agree to 1e-5 (float64: 1e-13) of the largest number, or of 1."""
    for wanted, got in zip(*both(name, outputs, *inputs), strict=True):
        assert_close(got, wanted, 1e-5, max(float(np.abs(wanted).max()), 1.0))


def unset(dtype, *shape):
    return np.full(shape, np.nan, dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("c", CHANNELS)
def test_rmsnorm(dtype, rows, c):
    x, dy, y = (normal(dtype, rows, c, seed=s) for s in range(3))
    wte, wpe = normal(dtype, 5, c), normal(dtype, 9, c, seed=1)
    tokens, positions = np.arange(rows, dtype=np.int32) % 5, np.arange(rows, dtype=np.int32)
    rstd = np.abs(normal(dtype, rows)) + np.dtype(dtype).type(0.5)
    new, new_rstd = unset(dtype, rows, c), unset(dtype, rows)
    compare("rmsnorm", [new, new_rstd], x)
    compare("embedding_rmsnorm", [new, new_rstd], tokens, positions, wte, wpe)
    compare("add_rmsnorm", [new, new, new_rstd], x, dy)
    compare("rmsnorm_backward", [new], dy, y, rstd)
    compare("rmsnorm_backward_add", [x], dy, y, rstd)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("c", CHANNELS)
def test_embedding(dtype, rows, c, add):
    wte, wpe, dy = normal(dtype, 27, c), normal(dtype, 16, c), normal(dtype, rows, c)
    draw = np.random.default_rng(rows)
    ids = [draw.integers(0, n, rows, np.int32) for n in (27, 16)]
    compare("embedding", [unset(dtype, rows, c)], *ids, wte, wpe)
    old = [wte, wpe] if add else [unset(dtype, 27, c), unset(dtype, 16, c)]
    compare("embedding_backward", old, dy, *ids, add)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("v", VOCABS)
def test_softmax_and_cross_entropy(dtype, rows, v):
    z, dy = normal(dtype, rows, v, scale=3.0), normal(dtype, rows, v, seed=1)
    new, losses, targets = unset(dtype, rows, v), unset(dtype, rows), some_targets(rows, v)
    compare("softmax", [new], z)
    compare("softmax_backward", [new], dy, np.abs(z))
    compare("cross_entropy", [losses], z, targets)
    compare("cross_entropy_backward", [new, losses], z, targets, 0.25)


@pytest.mark.parametrize("size", [1, 15, 4096, 4113, 20_000])
def test_update(dtype, size):
    p, m, v, g = (normal(dtype, size, seed=s) for s in range(4))
    scalars = np.array([0.01, 0.3, 0.03, 0.5])
    compare("adamw", [p, m, np.abs(v)], None, g, scalars, 0.9, 0.99, 1e-8, 0.1)
    compare("clip_scale", [np.zeros(1)], np.array([3.0]), 1.0)
    compare("add_losses", [np.ones(1)], g)
    (wanted,), (norm,) = both("global_norm", [np.zeros(1)], g)
    assert norm[0] == pytest.approx(wanted[0], rel=1e-6 if dtype == "float32" else 1e-13)


@pytest.mark.skipif(not HAS_MXCSR, reason="subnormal numbers take an x86's time only")
@pytest.mark.parametrize("size", [16, 1, 21])
def test_moments_that_fade_away_end_at_zero(size):
    """Rounded to nearest they would stay subnormal for ever, and every step wait for them."""
    least = np.finfo(np.float32).smallest_normal
    p, zero = np.ones(size, np.float32), np.zeros(size, np.float32)
    m, v = np.full((2, size), least * 1.05, np.float32)
    ops = CompiledOps(np, np.zeros(0, np.uint8), np.float32)
    scalars = np.array([0.01, 1.0, 1.0, 1.0])
    ops.adamw(p, m, v, None, zero, scalars, 0.9, 0.9, 1e-8, 0.0)
    assert not m.any()
    assert not v.any()
    assert (p == 1).all()
    assert (zero + least / 2 > 0).all()  # elsewhere subnormal numbers stay


BAD = [np.nan, np.inf, -np.inf]


def agree(name, outputs, *inputs):
    """NaN where the reference has NaN, inf where inf; the rest alike."""
    for wanted, got in zip(*both(name, outputs, *inputs), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 20, 32])  # in a whole vector, and in what is masked
def test_what_is_not_a_number_stays_visible(dtype, place, bad):
    rows, n = 3, 33
    x, dy, y = (normal(dtype, rows, n, seed=s) for s in range(3))
    rstd, targets = np.ones(rows, dtype), np.array([5, 0, 32], np.int32)
    new, row = unset(dtype, rows, n), unset(dtype, rows)
    x[1, place] = bad
    agree("rmsnorm", [new, row], x)
    agree("add_rmsnorm", [new, new, row], x, dy)
    agree("rmsnorm_backward", [new], x, y, rstd)
    agree("rmsnorm_backward", [new], dy, x, rstd)
    agree("rmsnorm_backward_add", [x], dy, y, rstd)
    agree("softmax", [new], x)
    agree("softmax_backward", [new], x, y)
    agree("cross_entropy", [row], x, targets)
    agree("cross_entropy_backward", [new, row], x, targets, 0.5)
    flat = x[1].copy()
    agree("global_norm", [np.zeros(1)], flat)
    agree("add_losses", [np.zeros(1)], flat)
    moments = [dy[0].copy(), y[0].copy(), np.abs(y[1])]
    agree("adamw", moments, None, flat, np.array([0.1, 0.1, 0.1, 1]), 0.9, 0.99, 1e-8, 0.0)


def test_a_bad_gradient_reaches_the_rows_of_its_ids_only(dtype):
    dy, ids = normal(dtype, 4, 33), np.array([0, 2, 2, 1], np.int32)
    dy[1, 32] = np.nan
    _, tables = both(
        "embedding_backward", [unset(dtype, 3, 33), unset(dtype, 4, 33)], dy, ids, ids[::-1], False
    )
    for table in tables:
        assert np.argwhere(np.isnan(table)).tolist() == [[2, 32]]


@pytest.mark.parametrize("v", [1, 16, 27])
def test_rows_of_minus_infinity_alone_are_nan(dtype, v):
    x = np.full((2, v), -np.inf, dtype)
    agree("softmax", [unset(dtype, 2, v)], x)
    agree("cross_entropy", [unset(dtype, 2)], x, np.zeros(2, np.int32))


def test_an_ignored_row_is_not_looked_at(dtype):
    z, targets = normal(dtype, 2, 7), np.array([-1, 3], np.int32)
    z[0] = np.nan
    outputs = [unset(dtype, 2, 7), unset(dtype, 2)]
    _, (dlogits, losses) = both("cross_entropy_backward", outputs, z, targets, 1.0)
    assert not dlogits[0].any()
    assert losses[0] == 0 < losses[1]


def test_a_row_has_the_same_bits_whatever_stands_beside_it(dtype):
    x, targets = normal(dtype, 5, 66), some_targets(5, 66)
    for name, outputs, inputs in (
        ("rmsnorm", [unset(dtype, 5, 66), unset(dtype, 5)], [x]),
        ("rmsnorm_backward", [unset(dtype, 5, 66)], [x, x[::-1].copy(), np.ones(5, dtype)]),
        ("softmax", [unset(dtype, 5, 66)], [x]),
        ("cross_entropy_backward", [unset(dtype, 5, 66), unset(dtype, 5)], [x, targets, 0.2]),
    ):
        _, together = both(name, outputs, *inputs)
        for n in range(5):
            one = [a[n : n + 1] if isinstance(a, np.ndarray) else a for a in inputs]
            _, alone = both(name, [a[n : n + 1] for a in outputs], *one)
            for a, b in zip(together, alone, strict=True):
                assert a[n : n + 1].tobytes() == b.tobytes()


@pytest.mark.parametrize("grid", [0.0, 0.5])  # 0.5: many logits are equal
@pytest.mark.parametrize("v", [1, 3, 27, 66, 1000])
def test_the_same_uniforms_draw_the_same_tokens(dtype, v, grid):
    rows = 64
    logits = normal(dtype, rows, v, scale=3.0)
    if grid:
        logits = np.round(logits / grid) * np.dtype(dtype).type(grid)
    logits[3, : v // 2] = -np.inf
    logits[4, -1:] = np.nan
    uniforms = np.random.default_rng(v).random(rows)
    uniforms[:2] = 0, np.nextafter(1, 0)
    tokens = np.full(rows, -7, np.int32)
    for temperature in (0, 0.3, 1, 2.5):
        for top_k in (0, 1, 5, v, v + 3):
            for top_p in (1.0, 0.95, 0.5, 1e-9):
                settings = (temperature, top_k, top_p)
                wanted, got = both("sample", [tokens], logits, uniforms, *settings)
                assert np.array_equal(*wanted, *got), settings


def test_the_heap_ranks_as_a_stable_sort_does():
    """Zeroed are the same weights, equals and zeros among them."""
    draw = np.random.default_rng(0)
    for _ in range(300):
        v = int(draw.integers(1, 40))
        weights = draw.integers(0, 6, v) / 4
        weights[draw.integers(v)] = 1.5
        top_k, top_p = int(draw.integers(1, v + 1)), float(draw.choice([1.0, 0.75, 0.5, 0.1]))
        order = np.argsort(-weights, kind="stable")
        ranked = np.where(np.arange(v) < top_k, weights[order], 0)
        before = ranked.cumsum() - ranked
        ranked[before >= top_p * ranked.sum()] = 0
        expected = np.zeros(v)
        expected[order] = ranked
        heap = np.full(v, -7, np.int32)
        keep_likely_row(weights, heap, top_k, top_p, v)
        assert np.array_equal(weights, expected)
        assert sorted(heap.tolist()) == list(range(v))
