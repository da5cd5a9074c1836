from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gpu_microgpt.ops.cuda import attention_short
from tests.cuda.attention_cases import Case, attend, attend_backward, exact, rounded
from tests.cuda.machine import Machine, assert_twice_plain, normal, twice

# Lengths around a tile of 16 rows, around a warp's two tiles, and all lengths of a full block.
CASES = [
    ([33, 1, 16], 2, 16, 3),
    ([17], 3, 32, 0),
    ([1], 1, 64, 1),
    ([5, 0, 64, 0, 40], 1, 32, 4),
    ([49, 32], 1, 128, 0),
]
LONG_CASES = [
    ([256], 2, 16, 0),
    ([255], 1, 64, 0),
    ([100, 256, 7], 1, 64, 2),
    ([129], 1, 128, 0),
]


def run(machine: Machine, case: Case) -> tuple[np.ndarray, ...]:
    """y, lse and dqkv, backward being given the forward kernel's y and lse."""
    ops, offsets = machine.ops(case.dtype), case.layout(machine).offsets
    qkv, dy, longest = machine.array(case.qkv), machine.array(case.dy), max(case.lengths)
    assert attention_short.fits(ops, "forward", case.head_dim, longest)
    assert attention_short.fits(ops, "backward", case.head_dim, longest)

    def both():
        y, dqkv = (machine.blank(a.shape, case.dtype) for a in (dy, qkv))
        lse = machine.blank((len(dy), case.n_head), np.float32)
        attention_short.forward(ops, y, lse, qkv, offsets, longest)
        attention_short.backward(ops, dqkv, dy, y, lse, qkv, offsets, longest)
        return y, lse, dqkv

    return twice(machine, both)


def check(machine: Machine, case: Case) -> None:
    y, lse, dqkv = run(machine, case)
    case = replace(case, lengths=[n for n in case.lengths if n])
    stored = rounded(case)
    (truth, true_lse), (plain, plain_lse) = attend(case, exact), attend(case, stored)
    assert_twice_plain(y, plain, truth)
    assert_twice_plain(lse, plain_lse.astype(np.float32), true_lse)
    parts = (len(dqkv), 3, -1)
    true_dqkv, plain_dqkv = attend_backward(case, exact), attend_backward(case, stored)
    for part in range(3):  # each by its own size
        assert_twice_plain(*(a.reshape(parts)[:, part] for a in (dqkv, plain_dqkv, true_dqkv)))
    for a in (y, lse, dqkv):
        assert not a[sum(case.lengths) :].any()


def small(machine: Machine) -> None:
    """Every kernel once: less and more than a warp's rows, scores that lift the exponents' base."""
    check(machine, Case.of("bfloat16", [7, 60, 33], 1, 16, padding=4, scale=3))


def test_small(machine):
    small(machine)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_formulas(machine, case):
    lengths, n_head, head_dim, padding = case
    check(machine, Case.of("bfloat16", lengths, n_head, head_dim, padding))


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_equals_the_formulas_for_long_sequences(one, case):
    lengths, n_head, head_dim, padding = case
    check(one, Case.of("bfloat16", lengths, n_head, head_dim, padding))


@pytest.mark.parametrize("scale", [30, 1e-3])
def test_large_and_tiny_scores(one, scale):
    check(one, Case.of("bfloat16", [70, 31], 1, 32, scale=scale))


def test_scores_that_rise_with_the_key(one):
    """Every tile of keys is above what the exponents were relative to before."""
    case = Case.of("bfloat16", [112], 1, 16)
    qkv = case.qkv.reshape(-1, 3, 16)
    qkv[:, 0], qkv[:, 1] = 4, (np.arange(112) / 8)[:, None]
    check(one, case)


def test_no_row_sees_a_later_one(one):
    case = Case.of("bfloat16", [60], 1, 32)
    before = run(one, case)[:2]
    for row in (15, 16, 40):
        qkv = case.qkv.copy()
        qkv[row:] = normal(case.dtype, 60 - row, qkv.shape[1], seed=2, scale=5)
        changed = run(one, replace(case, qkv=qkv))[:2]
        for old, new in zip(before, changed, strict=True):
            assert old[:row].tobytes() == new[:row].tobytes()
            assert (old[row:] != new[row:]).any(1).all()


def test_longest_is_a_bound(one):
    """The host may know less than the device: larger blocks than any sequence needs."""
    case = Case.of("bfloat16", [40, 3], 1, 16)
    machine = one
    ops, offsets = machine.ops(case.dtype), case.layout(machine).offsets
    want = run(machine, case)
    qkv, dy = machine.array(case.qkv), machine.array(case.dy)
    y, dqkv = (machine.blank(a.shape, case.dtype) for a in (case.dy, case.qkv))
    lse = machine.blank((43, 1), np.float32)
    attention_short.forward(ops, y, lse, qkv, offsets, 256)
    attention_short.backward(ops, dqkv, dy, y, lse, qkv, offsets, 256)
    for got, wanted in zip((y, lse, dqkv), want, strict=True):
        assert got.tobytes() == wanted.tobytes()


def test_what_fits(one):
    def fits(arch: str, direction: str, head_dim: int, longest: int) -> bool:
        ops = one.on(arch).ops("bfloat16")
        return attention_short.fits(ops, direction, head_dim, longest)

    for direction in ("forward", "backward"):
        for head_dim in (16, 32, 64, 128):
            assert fits("sm_90", direction, head_dim, 256)
            assert not fits("sm_90", direction, head_dim, 257)
        assert fits("sm_86", direction, 64, 256)  # 99 KiB
        assert not fits("sm_86", direction, 128, 256)
    assert fits("sm_80", "forward", 128, 256)
    assert not fits("sm_80", "backward", 128, 256)
