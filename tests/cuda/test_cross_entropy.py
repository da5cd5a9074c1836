from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from tests.cuda.machine import DTYPES, Machine, assert_twice_plain, normal, twice, wide
from tests.op_cases import some_targets

launcher = import_module("gpu_microgpt.ops.cuda.cross_entropy")  # not the function

# (rows, vocab, padding): rows 16-byte aligned or not, of a warp, a block, or kept by a block
SHAPES = [
    (1, 3, 0), (5, 3, 5), (33, 27, 0), (5, 64, 0), (7, 66, 62), (4, 1000, 24),
    (3, 1025, 0), (3, 1027, 5), (4, 2048, 0), (2, 50257, 0), (2, 50257, 47),
]  # fmt: skip
BACKWARD = "cross_entropy_backward_"


def formula(logits: np.ndarray, targets: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradients, in the precision of the logits."""
    largest = logits.max(-1, keepdims=True)
    exps = np.exp(logits - largest)
    total = exps.sum(-1, keepdims=True)
    picked = np.take_along_axis(logits, targets[:, None], -1)
    losses = np.where(targets >= 0, (np.log(total) + largest - picked)[:, 0], 0)
    slope = exps / total - (np.arange(logits.shape[1]) == targets[:, None])
    return losses, np.where(targets[:, None] >= 0, logits.dtype.type(scale) * slope, 0)


def in_rows(machine, values, padding):
    """A view of longer rows, NaN between them, and the whole."""
    rows, width = values.shape
    whole = np.full((rows, width + padding), np.nan, values.dtype)
    whole[:, :width] = values
    whole = machine.array(whole)
    return whole[:, :width], whole


def check(machine, dtype, rows, vocab, padding, shift=0.0, scale=1 / 96):
    """Forward and backward, out of place and in place; rows that are ignored hold NaN."""
    dtype, targets = DTYPES[dtype], some_targets(rows, vocab)
    logits = normal(dtype, rows, vocab, scale=3.0).astype(np.float32) + np.float32(shift)
    logits = logits.astype(dtype)
    with_nan = np.where(targets[:, None] < 0, dtype.type(np.nan), logits)
    ops = machine.ops(dtype)
    factor = machine.array(np.array([scale / 8], np.float32))

    def run():
        x, in_place = (in_rows(machine, with_nan, padding) for _ in range(2))
        dlogits = machine.blank((rows, vocab + padding), dtype)
        losses, again, forward = (machine.blank(rows, np.float32) for _ in range(3))
        on_device = machine.array(targets)
        ops.cross_entropy(forward, x[0], on_device)
        ops.cross_entropy_backward(dlogits[:, :vocab], losses, x[0], on_device, scale)
        ops.cross_entropy_backward(in_place[0], again, in_place[0], on_device, factor)
        return dlogits, losses, in_place[1], again, forward

    dlogits, losses, in_place, again, forward = twice(machine, run)
    want_losses, want = formula(wide(logits), targets, scale)
    plain_losses, plain = formula(logits.astype(np.float32), targets, scale)
    got = dlogits[:, :vocab]
    assert_twice_plain(got, plain.astype(dtype), want)
    assert_twice_plain(losses, plain_losses.astype(np.float32), want_losses)
    assert not wide(dlogits)[:, vocab:].any()
    assert not wide(dlogits)[targets < 0].any()
    assert not losses[targets < 0].any()
    assert wide(in_place).tobytes() == (wide(dlogits) / 8).tobytes()
    assert losses.tobytes() == again.tobytes()
    assert np.allclose(losses, forward, rtol=1e-6, atol=1e-6)


def small(machine: Machine) -> None:
    for dtype in DTYPES:
        check(machine, dtype, 4, 33, 0)
        check(machine, dtype, 4, 33, 7)
        with pytest.MonkeyPatch.context() as patch:  # blocks fewer than rows, and small
            patch.setattr(launcher, "teams", lambda *_: ("block", (2,), (64,)))
            check(machine, dtype, 4, 515, 0)
            check(machine, dtype, 4, 4131, 5)  # kept: several packs a thread
            patch.setattr(launcher, "in_packs", lambda *_: False)
            check(machine, dtype, 4, 131, 5)
            patch.undo()
            patch.setattr(launcher, "teams", lambda *_: ("block", (2,), (64,)))
            patch.setattr(launcher, "STATIC_SHARED", 1 << 20)
            check(machine, dtype, 4, 2211, 5)  # not kept, as if too long for it
    check_losses(machine, 301)


def check_losses(machine: Machine, size: int) -> None:
    losses = normal(np.float32, size)
    total = machine.array(np.array([0, 0, 0, 2.5]))[3:]  # aligned for one number only
    machine.ops(np.float32).add_losses(total, machine.array(losses))
    assert machine.host(total)[0] == pytest.approx(2.5 + math.fsum(losses), rel=1e-12)


def test_small(machine):
    small(machine)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_formula(one, dtype, shape):
    check(one, dtype, *shape)


@pytest.mark.parametrize("shift", [1000.0, -1000.0])  # exp of either would overflow or vanish
@pytest.mark.parametrize("vocab", [27, 2000])
def test_large_logits(one, dtype, vocab, shift):
    check(one, dtype, 4, vocab, 0, shift)


# (device, vocab, padding, backward kernel of float32, of bfloat16)
CHOICES = [
    ("sm_90", 66, 62, "warp", "warp"),
    ("sm_90", 1024, 0, "warp", "warp"),
    ("sm_90", 1025, 0, "block", "block"),
    ("sm_90", 1025, 7, "shared", "shared"),
    ("sm_90", 50257, 0, "block", "block"),  # rows of two or four bytes' alignment
    ("sm_90", 50257, 47, "shared", "shared"),
    ("sm_80", 50257, 47, "block", "shared"),
    ("sm_120", 50257, 47, "block", "shared"),
    ("sm_75", 50257, 47, "block", "block"),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_which_kernel(one, dtype, choice):
    arch, vocab, padding, *names = choice
    machine = one.on(arch)
    check(machine, dtype, 2, vocab, padding)
    launched = {name for name in machine.loader.launched if name.startswith(BACKWARD)}
    assert launched == {BACKWARD + names[dtype == "bfloat16"]}


def test_more_rows_than_warps(machine):
    ops, targets = machine.ops(np.float32), some_targets(200, 3)
    ops.device = replace(ops.device, multiprocessors=1)
    logits = normal(np.float32, 200, 3)
    dlogits, losses = machine.array(logits), machine.blank(200, np.float32)
    ops.cross_entropy_backward(dlogits, losses, dlogits, machine.array(targets), 1.0)
    want_losses, want = formula(wide(logits), targets, 1.0)
    assert np.allclose(machine.host(dlogits), want, atol=1e-6)
    assert np.allclose(machine.host(losses), want_losses, atol=1e-6)
    ops.cross_entropy(losses, machine.array(logits), machine.array(targets))
    assert np.allclose(machine.host(losses), want_losses, atol=1e-6)


@pytest.mark.parametrize("vocab", [27, 1027])
def test_all_rows_ignored(machine, dtype, vocab):
    dlogits, losses = machine.blank((3, 1032), DTYPES[dtype]), machine.blank(3, np.float32)
    targets, ops = machine.array(np.full(3, -1, np.int32)), machine.ops(DTYPES[dtype])
    view = dlogits[:, :vocab]
    ops.cross_entropy_backward(view, losses, view, targets, 1.0)
    assert not machine.host(losses).any()
    assert not wide(machine.host(dlogits)).any()
    ops.cross_entropy(losses, machine.blank((3, vocab), DTYPES[dtype]), targets)
    assert not machine.host(losses).any()


@pytest.mark.parametrize("vocab", [27, 1027])
def test_a_diverged_row_shows(machine, dtype, vocab):
    """One NaN is enough; the padding stays clean."""
    logits = normal(DTYPES[dtype], 2, vocab)
    logits[0, 5] = np.nan
    view, whole = in_rows(machine, logits, 1032 - vocab)
    losses, targets = machine.blank(2, np.float32), machine.array(np.array([9, 3], np.int32))
    machine.ops(DTYPES[dtype]).cross_entropy_backward(view, losses, view, targets, 1.0)
    assert np.isnan(machine.host(losses)).tolist() == [True, False]
    assert not wide(machine.host(whole))[:, vocab:].any()


@pytest.mark.parametrize("vocab", [27, 1027])
def test_impossible_tokens(machine, dtype, vocab):
    logits = np.full((1, vocab), -np.inf, DTYPES[dtype])
    logits[0, [3, vocab - 1]] = 0
    dlogits, losses = machine.array(logits), machine.blank(1, np.float32)
    targets = machine.array(np.array([3], np.int32))
    machine.ops(DTYPES[dtype]).cross_entropy_backward(dlogits, losses, dlogits, targets, 1.0)
    assert machine.host(losses)[0] == pytest.approx(math.log(2))
    want = np.zeros(vocab)
    want[[3, vocab - 1]] = -0.5, 0.5
    assert np.array_equal(wide(machine.host(dlogits))[0], want)


@pytest.mark.parametrize("size", [1, 7, 4096, 100_003])
def test_losses_are_added_up_in_float64(one, size):
    check_losses(one, size)


def test_wrong_arguments_are_named(machine):
    ops, x = machine.ops(np.float32), machine.blank((4, 8), np.float32)
    losses, targets = machine.blank(4, np.float32), machine.blank(4, np.int32)
    with pytest.raises(ValueError, match=r"cross_entropy: targets: got int64 .* wanted int32"):
        ops.cross_entropy(losses, x, targets.astype(np.int64))
    with pytest.raises(ValueError, match=r"cross_entropy: losses: got .*\(3,\), wanted .*\(4,\)"):
        ops.cross_entropy(losses[:3], x, targets)
    with pytest.raises(ValueError, match=r"backward: dlogits: got strides .* rows of neighbours"):
        ops.cross_entropy_backward(x[:, ::2], losses, x[:, :4], targets, 1.0)
    with pytest.raises(ValueError, match=r"backward: scale: got float64 .* wanted float32"):
        ops.cross_entropy_backward(x, losses, x, targets, machine.blank(1, np.float64))
    with pytest.raises(ValueError, match=r"add_losses: total: got float32 .* wanted float64"):
        ops.add_losses(losses[:1], losses)
