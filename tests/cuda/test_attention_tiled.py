"""Tiled attention on tensor cores; its launchers directly, whatever path a batch would take."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gpu_microgpt.ops.cuda import attention_tiled
from tests.cuda.attention_cases import Case, attend, attend_backward, exact, rounded
from tests.cuda.machine import Machine, assert_twice_plain, twice, wide

DIMS = [16, 32, 64, 128]


def launch(machine: Machine, case: Case, offsets: list[int] | None = None) -> tuple:
    """y, lse and dqkv on the machine."""
    rows, width = case.qkv.shape
    starts = np.array(offsets or np.cumsum([0, *case.lengths]), np.int32)
    ops = machine.ops(case.dtype, scratch_bytes=rows * case.n_head * 4)
    qkv, dy, at = (machine.array(x) for x in (case.qkv, case.dy, starts))
    y, dqkv = machine.blank(dy.shape, dy.dtype), machine.blank((rows, width), dy.dtype)
    lse, longest = machine.blank((rows, case.n_head), np.float32), max(case.lengths)
    attention_tiled.forward(ops, y, lse, qkv, at, longest)
    attention_tiled.backward(ops, dqkv, dy, y, lse, qkv, at, longest)
    return y, lse, dqkv


def check(machine: Machine, case: Case, offsets: list[int] | None = None) -> None:
    """Within twice the error of a plain bfloat16 version; zeros in rows of no sequence."""
    y, lse, dqkv = twice(machine, lambda: launch(machine, case, offsets))
    plain, truth = attend(case, rounded(case)), attend(case, exact)
    assert_twice_plain(y, plain[0], truth[0])
    assert_twice_plain(lse, plain[1], truth[1])
    plain_dqkv, true_dqkv = attend_backward(case, rounded(case)), attend_backward(case, exact)
    parts = (np.split(x, 3, axis=1) for x in (dqkv, plain_dqkv, true_dqkv))
    for got, plain_part, true_part in zip(*parts, strict=True):  # dq, dk, dv: of different sizes
        assert_twice_plain(got, plain_part, true_part)
    for out in (y, lse, dqkv):
        assert not out[sum(case.lengths) :].any(), "rows of no sequence are not zero"


def small(machine: Machine) -> None:
    """Every kernel: two blocks' worth of rows, a ragged end, rows of no sequence; scores far
    enough apart for the largest to move."""
    check(machine, Case.of("bfloat16", [131, 3], 1, 32, padding=3, scale=3.0))


def test_small(machine):
    small(machine)


@pytest.mark.parametrize(("lengths", "head_dim"), [([1], 16), ([17], 32), ([33, 2], 16)])
def test_short_sequences(machine, lengths, head_dim):
    check(machine, Case.of("bfloat16", lengths, 3, head_dim, padding=2))


@pytest.mark.parametrize("head_dim", DIMS)
def test_every_head_dim(one, head_dim):
    check(one, Case.of("bfloat16", [33, 160], 2, head_dim, padding=1))


@pytest.mark.parametrize(
    ("lengths", "head_dim"),
    [([64, 65], 32), ([255], 64), ([300], 128), ([129, 1, 300], 16), ([128, 256], 16)],
)
def test_ragged_sizes(one, lengths, head_dim):
    check(one, Case.of("bfloat16", lengths, 1, head_dim, padding=5))


def test_more_rows_of_no_sequence_than_blocks(one):
    check(one, Case.of("bfloat16", [5], 2, 16, padding=500))


def test_sequences_of_no_rows(machine):
    check(machine, Case.of("bfloat16", [17, 140], 1, 16, padding=4), [0, 0, 17, 17, 157, 157])


def test_large_scores(one):
    """Standard deviation 900 * 4: nearly one-hot, the largest moves far between tiles."""
    check(one, Case.of("bfloat16", [200], 2, 16, scale=30.0))


@pytest.mark.parametrize("order", [1, -1])
def test_scores_that_rise_or_fall_with_the_key(one, order):
    """Rising scores move the largest in every step; falling ones never after the first."""
    case = Case.of("bfloat16", [180], 1, 32)
    q, k, _ = np.split(case.qkv, 3, axis=1)
    q[:], k[:] = 1, np.linspace(-9, 9, 180)[::order, None]
    check(one, case)


def test_a_long_sequence(one):
    check(one, Case.of("bfloat16", [1024], 1, 64))


def test_a_very_long_sequence(one):
    """Some of its queries and keys, whose gradients take y and lse of the others as they are."""
    case, some = Case.of("bfloat16", [4096], 1, 16), np.array([0, 63, 64, 2047, 2048, 4031, 4095])
    y, lse, dqkv = (one.host(x) for x in launch(one, case))
    (q, k, v), dy = np.split(wide(case.qkv), 3, axis=1), wide(case.dy)
    position, delta = np.arange(4096), (wide(y) * dy).sum(1, keepdims=True)

    def expected(stored):
        s = np.where(position > some[:, None], -np.inf, stored(q[some] @ k.T / 4))
        some_lse = np.log(np.exp(s).sum(1, keepdims=True))
        p, dp = stored(np.exp(s - some_lse)), stored(dy[some] @ v.T)
        dq = stored(p * (dp - delta[some])) @ k / 4
        p_t = stored(np.exp(stored(k[some] @ q.T / 4) - lse.T) * (position >= some[:, None]))
        ds_t = stored(p_t * (stored(v[some] @ dy.T) - delta.T))
        return some_lse, *map(stored, (p @ v, dq, ds_t @ q / 4, p_t @ dy))

    got = lse[some], y[some], *np.split(dqkv[some], 3, axis=1)
    for out, plain, truth in zip(got, expected(rounded(case)), expected(exact), strict=True):
        assert_twice_plain(out, plain, truth)


def test_other_devices(one):
    """Shared memory of the largest tiles fits the smallest GPUs with tensor cores."""
    check(one.on("sm_86"), Case.of("bfloat16", [70], 1, 128))
    for head_dim in DIMS:
        shared = attention_tiled.forward_shared(head_dim), attention_tiled.backward_shared(head_dim)
        assert max(shared) + 2048 <= one.on("sm_86").device.shared_per_block  # and some of its own


def test_no_query_sees_a_later_key(one):
    """Rows after 140 change nothing before; without their dy they get no gradient."""
    case = Case.of("bfloat16", [300], 1, 16)
    case.dy[140:] = 0
    other = dataclasses.replace(case, qkv=case.qkv.copy())
    other.qkv[140:] = 3
    y, lse, dqkv = (one.host(x) for x in launch(one, case))
    other_y, other_lse, other_dqkv = (one.host(x) for x in launch(one, other))
    for out, other_out in ((y, other_y), (lse, other_lse), (dqkv, other_dqkv)):
        assert np.array_equal(out[:140], other_out[:140])
    assert not dqkv[140:].any()
    assert not other_dqkv[140:].any()


def test_scratch_is_a_number_a_row_and_head(one):
    case = Case.of("bfloat16", [20], 2, 16)
    y, lse = one.array(case.dy), one.blank((20, 2), np.float32)
    ops = one.ops(case.dtype, scratch_bytes=20 * 2 * 4 - 1)
    with pytest.raises(MemoryError):
        attention_tiled.backward(ops, one.array(case.qkv), y, y, lse, one.array(case.qkv),
                                 one.array(np.array([0, 20], np.int32)), 20)  # fmt: skip
