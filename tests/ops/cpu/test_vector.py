"""The words of the vector language against NumPy, for both dtypes and at the edge of memory."""

from __future__ import annotations

import numpy as np
import pytest

from tests.guard_page import up_to_the_edge
from tests.op_cases import normal

numba = pytest.importorskip("numba", reason="the compiled operations need Numba")

from gpu_microgpt.ops.cpu.code import VECTOR_BYTES  # noqa: E402
from gpu_microgpt.ops.cpu.compile import compiled  # noqa: E402
from gpu_microgpt.ops.cpu.vector import (  # noqa: E402
    at,
    fma,
    keep,
    keep_below,
    keep_from,
    lane_of,
    lanes,
    load,
    load_some,
    quotient,
    splat,
    store,
    store_some,
    transpose,
    transpose_some,
    vexp,
    vlog,
    vmax,
    vmax_of,
    vsqrt,
    vsum,
    with_lane,
)

NAN = float("nan")


def width(dtype):
    return VECTOR_BYTES // np.dtype(dtype).itemsize


@compiled
def by_lanes(out, u, v, w):
    """out (12, lanes): one row a word."""
    a, b, c, n = load(u, 0), load(v, 0), load(w, 0), lanes(out)
    store(out, 0 * n, a + b)
    store(out, 1 * n, a - 1)
    store(out, 2 * n, 2.5 * b)
    store(out, 3 * n, a / c)
    store(out, 4 * n, -a)
    store(out, 5 * n, fma(a, b, c))
    store(out, 6 * n, fma(a, 2, b))
    store(out, 7 * n, vmax(a, b))
    store(out, 8 * n, keep(a, b))
    store(out, 9 * n, vsqrt(c))
    store(out, 10 * n, splat(a, 3))
    a += b
    a *= c
    store(at(out, 8 * n), 3 * n, a)


def test_words_by_lanes(dtype):
    n = width(dtype)
    u, v = normal(dtype, n), normal(dtype, n, seed=1)
    w = np.abs(normal(dtype, n, seed=2)) + 1
    out = np.full((12, n), NAN, dtype)
    by_lanes(out, u, v, w)
    expected = [
        u + v, u - 1, 2.5 * v, u / w, -u, u * v + w, u * 2 + v, np.maximum(u, v),
        np.where(v > 0, u, 0), np.sqrt(w), np.full(n, 3), (u + v) * w,
    ]  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=4 * np.finfo(dtype).eps, atol=1e-6)
    exact = [0, 1, 2, 4, 7, 8, 10]
    assert np.array_equal(out[exact], np.array(expected, dtype)[exact])


@compiled
def with_nan(out, x):
    n = lanes(x)
    v = load(x, 0)
    store(out, 0, vmax(0, v))
    store(out, n, keep(v, v))
    store(out, 2 * n, v * 0)


def test_what_may_be_nan_is_given_second(dtype):
    x = np.full(width(dtype), NAN, dtype)
    out = np.zeros((3, width(dtype)), dtype)
    with_nan(out, x)
    assert np.isnan(out[[0, 2]]).all()
    assert (out[1] == 0).all()


@compiled
def horizontal(out, x):
    out[0] = vsum(load(x, 0))
    out[1] = vmax_of(load(x, 0))


def test_horizontal(dtype):
    x = normal(dtype, width(dtype)) - 3
    out = np.zeros(2, dtype)
    horizontal(out, x)
    assert out[1] == x.max()
    assert out[0] == pytest.approx(x.astype(float).sum(), rel=1e-6)


@compiled
def kept(out, x, n):
    store(out, 0, keep_below(load(x, 0), n, -1))
    store(out, lanes(x), keep_from(load(x, 0), n, -2))


@compiled
def tail(y, x, n):
    store_some(y, 0, load_some(x, 0, n, -1), n)
    return vsum(load_some(x, 0, n, 1))


def test_tails_of_every_length_touch_nothing_beyond(dtype):
    count = width(dtype)
    lane, every = np.arange(count), up_to_the_edge(normal(dtype, count))
    for n in (-9, *range(count + 1), count + 1, 1 << 40):
        out = np.full((2, count), NAN, dtype)
        kept(out, every, n)
        assert np.array_equal(out[0], np.where(lane < n, every, -1))
        assert np.array_equal(out[1], np.where(lane >= n, every, -2))
        size = min(max(n, 0), count)
        x = up_to_the_edge(every[:size])
        y = up_to_the_edge(np.full(size, NAN, dtype))
        total = tail(y, x, n)
        assert np.array_equal(y, x)
        assert total == pytest.approx(x.astype(float).sum() + count - size, abs=1e-5)
        before = np.full(count + 3, 5, dtype)
        tail(before, x, n)
        assert (before[size:] == 5).all()


@compiled
def exps(y, x):
    for j in range(0, x.size, lanes(x)):
        store(y, j, vexp(load(x, j)))


def test_exp_over_the_whole_range(dtype):
    low, high, error = (-86.98, 88.72, 4e-7) if dtype == "float32" else (-708.0, 709.7, 1e-13)
    x = np.concatenate([np.linspace(low, high, 1 << 16), np.linspace(-1, 1, 1 << 14)])
    x, y = x.astype(dtype), np.empty(x.size, dtype)
    exps(y, x)
    expected = np.exp(x.astype(np.longdouble))
    errors = np.abs(y / expected - 1)
    assert errors.max() < error
    if dtype == "float32":
        assert errors[np.abs(x) < 10].max() < 1.5e-7


def test_exp_at_its_ends(dtype):
    past = 89 if dtype == "float32" else 710
    x = np.full(16, 0, dtype)
    x[:9] = 0, -0.0, np.inf, -np.inf, NAN, past, -past, 1e30, -1e30
    y = np.empty(16, dtype)
    exps(y, x)
    assert np.array_equal(y[:9], [1, 1, np.inf, 0, NAN, np.inf, 0, np.inf, 0], equal_nan=True)


@compiled
def turned(c, a, lda, ldc):
    transpose(a, 0, lda, c, 0, ldc)


@compiled
def turned_some(c, a, lda, rows, columns, ldc):
    transpose_some(a, 0, lda, rows, columns, c, 0, ldc)


def test_transposition(dtype):
    n = width(dtype)
    a, c = normal(dtype, n, n + 3), np.full((n, n + 1), NAN, dtype)
    turned(c, a, n + 3, n + 1)
    assert np.array_equal(c[:, :n], a[:, :n].T)
    assert np.isnan(c[:, n]).all()


@pytest.mark.parametrize("missing", [(0, 1), (1, 0), (1, 1), (2, 3)])
def test_transposition_of_a_corner(dtype, missing):
    n = width(dtype)
    rows, columns = (max(1, n - k) for k in missing)
    a = up_to_the_edge(normal(dtype, rows, columns))
    c = up_to_the_edge(np.full((columns, n), NAN, dtype))
    turned_some(c, a, columns, rows, columns, n)
    assert np.array_equal(c[:, :rows], a.T)
    assert (c[:, rows:] == 0).all()


@pytest.mark.parametrize("array", [np.zeros(64, np.int32), np.zeros(64, np.float32)[::2]])
def test_places_are_contiguous_floats(array):
    with pytest.raises(numba.TypingError):
        horizontal(np.zeros(2, np.float32), array)


@compiled
def logs(y, x):
    for j in range(0, x.size, lanes(x)):
        store(y, j, vlog(load(x, j)))


def test_log_over_the_whole_range(dtype):
    low, high, error = (-87, 88.7, 3e-7) if dtype == "float32" else (-708, 709.7, 5e-16)
    x = np.exp(np.linspace(low, high, 1 << 16))
    x = np.concatenate([x, np.linspace(0.5, 2, 1 << 16), [1] * 16]).astype(dtype)
    y = np.empty(x.size, dtype)
    logs(y, x)
    expected = np.log(x.astype(np.longdouble))
    assert (y[-16:] == 0).all()
    others = expected != 0
    assert np.abs(y[others] / expected[others] - 1).max() < error


def test_log_at_its_ends(dtype):
    x = np.full(16, 1, dtype)
    x[:3] = np.inf, NAN, np.finfo(dtype).tiny
    y = np.empty(16, dtype)
    logs(y, x)
    assert np.array_equal(y[:2], x[:2], equal_nan=True)
    assert y[2] == pytest.approx(np.log(float(x[2])), rel=1e-6)


@compiled
def quotients(y, u, v):
    for j in range(0, y.size, lanes(y)):
        store(y, j, quotient(load(u, j), load(v, j)))


def test_quotient(dtype):
    size = 1 << 14
    u, exponents = normal(dtype, size), normal(dtype, size, seed=1)
    v = np.exp(8 * exponents)
    u[:4] = 0, -0.0, NAN, 1e30
    y = np.empty(size, dtype)
    quotients(y, u, v)
    expected = u.astype(np.longdouble) / v
    assert np.isnan(y[2])
    u[2], y[2], expected[2] = 0, 0, 0
    assert (y[u == 0] == 0).all()
    some = u != 0
    assert np.abs(y[some] / expected[some] - 1).max() < (3e-7 if dtype == "float32" else 4e-16)


@compiled
def with_lanes(out, x, count):
    v, u = splat(out, 0), load(x, 0)
    for i in range(count):
        v = with_lane(v, i, lane_of(u, i))
    store(out, 0, v)


def test_a_lane_at_a_time(dtype):
    x = normal(dtype, width(dtype))
    for count in range(width(dtype) + 1):
        out = np.full(width(dtype), NAN, dtype)
        with_lanes(out, x, count)
        assert np.array_equal(out[:count], x[:count])
        assert (out[count:] == 0).all()
