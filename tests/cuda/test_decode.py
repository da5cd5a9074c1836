from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.machine import DTYPES, Machine, normal, wide

SIZES = [1, 3, 31, 33, 130]  # the last is more than a block
STOP = 2


def check_forbid(machine, name, size, vocab, token, apart=0):
    """Rows `apart` numbers longer than they are said to be; nothing but the column changes."""
    whole = normal(DTYPES[name], size, vocab + apart)
    logits = machine.array(whole)
    machine.ops(DTYPES[name]).forbid(logits[:, :vocab], token)
    wanted = whole.copy()
    wanted[:, token] = -np.inf
    assert np.array_equal(wide(machine.host(logits)), wide(wanted))


def tokens_of(size, steps):
    return np.random.default_rng(size).integers(0, 5, (steps, size), np.int32)


def check_emit(machine, size, *, steps=7, ring=4, stop=STOP, first=0):
    """Against the text that the host would write: after every step, all that is in the ring."""
    drawn = tokens_of(size, steps)
    lengths, positions = np.arange(size, dtype=np.int32), np.full(size, first, np.int32)
    ended = (np.arange(size) % 7 == 6).astype(np.int32)  # some had before
    out, ops = machine.blank((ring, size), np.int32), machine.ops(np.float32)
    on_device = [machine.array(a) for a in (ended, lengths, positions)]
    wanted, over = np.full((ring, size), -1, np.int32), ended.astype(bool)  # blank reads -1
    for step, tokens in enumerate(drawn):
        ops.emit(out, on_device[0], machine.array(tokens), *on_device[1:], stop)
        wanted[(first + step) % ring] = np.where(over, -1, tokens)
        over |= tokens == stop
        assert np.array_equal(machine.host(out), wanted), f"step {step}"
        assert np.array_equal(machine.host(on_device[0]) != 0, over)
    assert np.array_equal(machine.host(on_device[1]), lengths + steps)
    assert np.array_equal(machine.host(on_device[2]), positions + steps)


def small(machine: Machine) -> None:
    for name in DTYPES:
        check_forbid(machine, name, 131, 5, 4, apart=3)
    check_emit(machine, 131, steps=3, ring=2)
    check_emit(machine, 3, stop=-1)


def test_small(machine):
    small(machine)


@pytest.mark.parametrize("size", SIZES)
def test_forbidden_is_minus_infinity(machine, dtype, size):
    for vocab, token in ((1, 0), (7, 0), (7, 6), (66, 13)):
        check_forbid(machine, dtype, size, vocab, token)
        check_forbid(machine, dtype, size, vocab, token, apart=6)


def test_the_forbidden_is_not_sampled(machine, dtype):
    logits = machine.array(np.array([[1, 9, 3, 2], [5, 9, -3, 2]], DTYPES[dtype]))
    tokens, ops = machine.blank(2, np.int32), machine.ops(DTYPES[dtype])
    ops.forbid(logits, 1)
    ops.sample(tokens, logits, machine.array(np.full(2, 0.5)), 0.0, 0, 1.0)
    assert machine.host(tokens).tolist() == [2, 0]
    for uniform in (0.0, 0.6, 1 - 2**-53):
        ops.sample(tokens, logits, machine.array(np.full(2, uniform)), 3.0, 0, 1.0)
        assert 1 not in machine.host(tokens)


@pytest.mark.parametrize("ring", [1, 3, 64])
@pytest.mark.parametrize("size", SIZES)
def test_emit_writes_the_text(machine, size, ring):
    check_emit(machine, size, ring=ring)


def test_nothing_ends_without_a_stop(machine):
    check_emit(machine, 33, stop=-1)


def test_a_ring_is_entered_anywhere(machine):
    check_emit(machine, 5, ring=3, first=2**31 - 20)


def test_sequences_are_at_positions_of_their_own(machine):
    positions = machine.array(np.array([0, 4, 3], np.int32))
    tokens, none = machine.array(np.array([7, 8, 9], np.int32)), np.zeros(3, np.int32)
    out = machine.blank((3, 3), np.int32)
    ended, lengths = machine.array(none), machine.array(none)
    machine.ops(np.float32).emit(out, ended, tokens, lengths, positions, STOP)
    assert machine.host(out).tolist() == [[7, -1, 9], [-1, 8, -1], [-1, -1, -1]]
    assert machine.host(positions).tolist() == [1, 5, 4]


def test_any_grid(machine):
    """One warp, in turns."""
    ops, size = machine.ops(np.float32), 70
    logits = machine.array(normal(np.float32, size, 3))
    numbers = np.int32(size), np.int64(3), np.int32(1)
    ops.kernel("decode", "forbid")((1,), (32,), (logits, *numbers))
    assert np.isneginf(machine.host(logits)[:, 1]).all()
    out, tokens = machine.blank((2, size), np.int32), tokens_of(size, 1)[0]
    counts = [machine.array(np.ones(size, np.int32)) for _ in range(2)]
    arrays = out, machine.array(np.zeros(size, np.int32)), *counts, machine.array(tokens)
    numbers = np.int32(2), np.int32(size), np.int32(STOP)
    ops.kernel("decode", "emit")((1,), (32,), (*arrays, *numbers))
    assert np.array_equal(machine.host(out)[1], tokens)


def test_wrong_arguments_are_named(machine):
    ops, logits = machine.ops(np.float32), machine.blank((4, 8), np.float32)
    for token in (-1, 8):
        with pytest.raises(ValueError, match=f"forbid: token: got {token}, wanted 0 to 7"):
            ops.forbid(logits, token)
    with pytest.raises(ValueError, match=r"forbid: logits: got float64 \(4, 8\), wanted float32"):
        ops.forbid(machine.blank((4, 8), np.float64), 0)
    with pytest.raises(ValueError, match=r"forbid: logits: got strides .* wanted rows of neigh"):
        ops.forbid(logits.T, 0)
    with pytest.raises(ValueError, match=r"forbid: logits: got shape \(8,\), wanted rows"):
        ops.forbid(logits[0], 0)
    out, row = machine.blank((3, 4), np.int32), machine.blank(4, np.int32)
    good = {"out": out} | dict.fromkeys(("ended", "tokens", "lengths", "positions"), row)
    for name, wrong, message in (
        ("out", out[:0], r"got int32 \(0, 4\), wanted int32 \(1, 4\)"),
        ("out", machine.blank((4, 3), np.int32).T, "got strides"),
        ("out", row, r"got shape \(4,\), wanted rows and columns"),
        ("ended", machine.blank(4, np.uint8), r"got uint8 \(4,\), wanted int32 \(4,\)"),
        ("tokens", machine.blank(4, np.int64), r"got int64 \(4,\), wanted int32 \(4,\)"),
        ("lengths", row[:3], r"got int32 \(3,\), wanted int32 \(4,\)"),
        ("positions", machine.blank(8, np.int32)[::2], "got strides"),
    ):
        with pytest.raises(ValueError, match=f"emit: {name}: {message}"):
            ops.emit(**good | {name: wrong}, stop=-1)
