from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from gpu_microgpt.data.batch import Layout
from gpu_microgpt.ops.cuda import attention_general
from gpu_microgpt.ops.cuda.attention_general import (
    BACKWARD_ROWS,
    FORWARD_ROWS,
    cut,
    lanes_a_row,
    padded,
)
from gpu_microgpt.ops.cuda.device import KNOWN
from gpu_microgpt.ops.reference import ReferenceOps
from tests.cuda.attention_cases import Case, attend, attend_backward, exact, rounded
from tests.cuda.machine import Machine, assert_twice_plain, twice, wide
from tests.cuda_on_cpu.loader import EmulatedLoader

WIDE = 132  # multiprocessors small batches do not fill: a row a thread
EVEN = 2
FULL = 0  # as many rows a thread as there may be


def run(
    machine: Machine, case: Case, multiprocessors: int = WIDE, longest: int = 0
) -> tuple[np.ndarray, ...]:
    """y, lse, dqkv: the same bits twice."""
    ops, layout = machine.ops(case.dtype), case.layout(machine)
    ops.device = replace(ops.device, multiprocessors=multiprocessors)
    qkv, dy = machine.array(case.qkv), machine.array(case.dy)
    rest = (layout.offsets, max(layout.longest, longest))

    def once():
        y, dqkv = (machine.blank(x.shape, case.dtype) for x in (case.dy, case.qkv))
        lse = machine.blank((len(case.dy), case.n_head), np.float32)
        attention_general.forward(ops, y, lse, qkv, *rest)
        attention_general.backward(ops, dqkv, dy, y, lse, qkv, *rest)
        return y, lse, dqkv

    return twice(machine, once)


def by_numpy(case: Case) -> tuple[np.ndarray, ...]:
    """y, lse, dqkv of a plain version: for float32 the reference."""
    if case.dtype != np.float32:
        return *attend(case, rounded(case)), attend_backward(case, rounded(case))
    layout = Layout.of(np.array(case.lengths))
    rows, ops = layout.offsets[-1], ReferenceOps(np, np.empty(16 << 20, np.uint8))
    y, dqkv = np.zeros_like(case.dy), np.zeros_like(case.qkv)
    lse = np.zeros((len(y), case.n_head), np.float32)
    ops.attention(y[:rows], lse[:rows], case.qkv[:rows], layout, case.n_head)
    args = (case.dy[:rows], y[:rows], lse[:rows], case.qkv[:rows], layout, case.n_head)
    ops.attention_backward(dqkv[:rows], *args)
    return y, lse, dqkv


def check(machine: Machine, case: Case, multiprocessors: int = WIDE, longest: int = 0) -> None:
    """By the 2x rule; zeros in the padding."""
    compare(case, run(machine, case, multiprocessors, longest))


def compare(case: Case, got: tuple[np.ndarray, ...]) -> None:
    case = replace(case, lengths=[n for n in case.lengths if n])
    truth = (*attend(case, exact), attend_backward(case, exact))
    for array in got:
        assert not wide(array[sum(case.lengths) :]).any(), "padding"
    parts = ((*x[:2], *np.split(x[2], 3, axis=1)) for x in (got, by_numpy(case), truth))
    for part, plain, expected in zip(*parts, strict=True):  # y, lse, dq, dk, dv
        assert_twice_plain(part, plain, expected)


def small(machine: Machine) -> None:
    """Every kernel: several heads a warp, several tiles and bands, one and more rows a thread."""
    check(machine, Case.of("float32", [1, 0, 7, 2], 3, 4, padding=5))
    check(machine, Case.of("bfloat16", [70, 3], 1, 4, padding=1))
    check(machine, Case.of("float32", [70, 3], 1, 100, padding=1), FULL)


def test_small(machine):
    small(machine)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "multiprocessors"),
    [
        ("float32", 4, WIDE),
        ("float32", 12, FULL),
        ("float32", 20, WIDE),
        ("float32", 32, EVEN),
        ("float32", 100, FULL),
        ("bfloat16", 8, FULL),
        ("bfloat16", 20, WIDE),
        ("bfloat16", 64, FULL),
        ("bfloat16", 128, WIDE),
    ],
)
def test_lengths(one, dtype, head_dim, multiprocessors):
    machine, long = one, 300 if head_dim < 32 else 150
    for lengths in [1], [1, 1, 1], [17], [0, 33], [1, 2, 2, 7, 31, 33], [255], [long]:
        case = Case.of(dtype, lengths, 2, head_dim, padding=len(lengths))
        check(machine, case, multiprocessors)


@pytest.mark.parametrize(("dtype", "multiprocessors"), [("float32", WIDE), ("bfloat16", FULL)])
def test_large_scores(one, dtype, multiprocessors):
    case = Case.of(dtype, [40, 7, 1], 3, 8, padding=2, scale=10.0)
    check(one, case, multiprocessors)


def test_longest_is_a_bound(one, dtype):
    for longest in 16, 64, 300:
        check(one, Case.of(dtype, [9, 0, 1], 2, 8, padding=3), FULL, longest)


def test_public_operations(machine, dtype):
    """bfloat16 comes here for head dims the tensor cores' kernels leave out, or without those."""
    head_dim, arch = (32, "sm_75") if dtype == "bfloat16" else (12, "sm_90")
    case = Case.of(dtype, [5, 17, 1], 2, head_dim, padding=2)
    ops, layout = machine.on(arch).ops(case.dtype), case.layout(machine)
    qkv, dy = machine.array(case.qkv), machine.array(case.dy)
    y, dqkv = (machine.blank(x.shape, case.dtype) for x in (case.dy, case.qkv))
    lse = machine.blank((len(case.dy), case.n_head), np.float32)
    ops.attention(y, lse, qkv, layout, case.n_head)
    ops.attention_backward(dqkv, dy, y, lse, qkv, layout, case.n_head)
    compare(case, tuple(map(machine.host, (y, lse, dqkv))))


def test_wrong_arguments_are_named(machine):
    case = Case.of("float32", [3], 2, 4)
    ops, layout, qkv = machine.ops(np.float32), case.layout(machine), machine.array(case.qkv)
    y, lse = machine.blank((3, 8), np.float32), machine.blank((3, 2), np.float32)
    with pytest.raises(
        ValueError, match=r"attention: lse: got float32 \(3, 1\), wanted .*\(3, 2\)"
    ):
        ops.attention(y, lse[:, :1], qkv, layout, 2)
    with pytest.raises(ValueError, match=r"attention: qkv: got shape \(72,\), wanted rows and"):
        ops.attention(y, lse, qkv.reshape(-1), layout, 2)
    with pytest.raises(ValueError, match="attention: offsets: got no sequence, wanted one or more"):
        ops.attention(y, lse, qkv, Layout(layout.offsets[:1], ()), 2)
    with pytest.raises(ValueError, match=r"attention: qkv: got 24 numbers a row for 4 heads"):
        ops.attention(y, lse, qkv, layout, 4)
    with pytest.raises(ValueError, match=r"attention_backward: dy: got float32 \(2, 8\), wanted"):
        ops.attention_backward(qkv, y[:2], y, lse, qkv, layout, 2)


def test_later_rows_do_not_matter(machine, dtype):
    case = Case.of(dtype, [20], 2, 4)
    later = replace(case, qkv=case.qkv.copy())
    later.qkv[13:] = -3 * later.qkv[13:]
    y, lse, _ = run(machine, case)
    other, other_lse, _ = run(machine, later)
    assert y[:13].tobytes() == other[:13].tobytes()
    assert lse[:13].tobytes() == other_lse[:13].tobytes()
    assert (wide(y[13:]) != wide(other[13:])).any()


@pytest.mark.parametrize("arch", KNOWN)
@pytest.mark.parametrize("choices", [FORWARD_ROWS, BACKWARD_ROWS], ids=["forward", "backward"])
def test_plans(arch, choices):
    ops = Machine(EmulatedLoader(), KNOWN[arch]).ops(np.float32)
    sizes = product(range(4, 132, 4), (1, 7, 64, 10_000), (1, 2, 5, 16, 33, 256, 1024))
    for head_dim, pairs, longest in sizes:
        plan = cut(ops, head_dim, pairs, longest, choices)
        band = plan.lanes // lanes_a_row(head_dim) * plan.rows
        assert plan.block % 32 == 0
        assert plan.block <= 128
        assert plan.pairs * plan.grid[0] >= pairs
        assert band * plan.grid[1] >= longest
        assert plan.tile % 4 == 0
        assert band % plan.tile == 0
        assert plan.pairs == 1 or plan.tile == band >= longest
        assert plan.pairs * 2 * plan.tile * (padded(head_dim) + 1) * 4 <= 48 << 10


def test_short_sequences_fill_warps():
    """names: 16 sequences of 16 rows, four heads of four channels: two of these a warp."""
    plan = cut(Machine(EmulatedLoader()).ops(np.float32), 4, 16 * 4, 16, FORWARD_ROWS)
    assert (plan.rows, plan.lanes, plan.block, plan.grid) == (1, 16, 32, (32, 1))
