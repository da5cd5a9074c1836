"""A program played by a team: the same bits as by one thread, whoever comes, late or never."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled operations need Numba")

from gpu_microgpt.ops.cpu import AmxOps, CompiledOps, DotOps, bf16_unit
from gpu_microgpt.ops.cpu.compile import compiled
from gpu_microgpt.ops.cpu.parts import bring_part, first_of, play_part, scratch_of
from gpu_microgpt.ops.cpu.team import (
    ASKED,
    CLOSED,
    COMING,
    DONE,
    GONE,
    LATE,
    WIDTH,
    close_team,
    help_out,
    load_word,
    missing,
    play_together,
    store_word,
)
from gpu_microgpt.ops.cpu.vector import at

SEQUENCES, N_HEAD, LONGEST, HEAD_DIM, OUTPUTS = 3, 5, 9, 20, 71  # whole vectors of nothing
CHANNELS = N_HEAD * HEAD_DIM
kinds = pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (CompiledOps, "f4"),
        (CompiledOps, "f8"),
        *((kind, "f4") for kind in (AmxOps, DotOps) if bf16_unit() == "AMX"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
rows_of = pytest.mark.parametrize("rows", [1, SEQUENCES, 14])


@compiled
def do_part(like, a, rows, part, parts, y):
    """Elsewhere, and bring it; returns how much it is."""
    play_part(like, a, rows, part, parts, at(y, 0), scratch_of(like, a))
    bring_part(like, a, rows, part, parts, at(y, 0))
    return first_of(a, rows, part + 1, parts) - first_of(a, rows, part, parts)


@compiled
def store_word_at(words, index, number):
    store_word(words, index, number)


@compiled
def load_word_at(words, index):
    return load_word(words, index)


class Decoding:
    """Two products and attention between them, and what comes of them."""

    def __init__(self, kind: type[CompiledOps], dtype: str, rows: int) -> None:
        draw = np.random.default_rng(rows)

        def some(*shape: int) -> np.ndarray:
            return draw.normal(size=shape).astype(dtype)

        self.rows = rows
        self.x, self.residual = some(rows, CHANNELS), some(rows, OUTPUTS)
        self.qkv, self.y = some(rows, 3 * CHANNELS), some(rows, CHANNELS)
        self.out, self.relu = some(rows, OUTPUTS), some(rows, OUTPUTS)
        keys, values = (some(rows, N_HEAD, LONGEST, HEAD_DIM) for _ in range(2))
        lengths = draw.integers(0, LONGEST, rows).astype("i4")
        lengths[0] = LONGEST - 1
        norm = some(rows, CHANNELS)
        ops = kind(np, np.zeros(1 << 20, "u1"), np.dtype(dtype))
        with ops.recording() as self.program:
            ops.linear(self.qkv, self.x, some(3 * CHANNELS, CHANNELS))
            ops.attention_decode(self.y, self.qkv, keys, values, lengths)
            ops.rmsnorm(norm, some(rows), self.y)
            ops.linear_add(self.out, norm, some(OUTPUTS, CHANNELS), self.residual)
            ops.linear_relu(self.relu, self.relu, norm, some(OUTPUTS, CHANNELS))

    def arrays(self) -> list[np.ndarray]:
        return [self.qkv, self.y, self.out, self.relu]

    def results(self) -> list[bytes]:
        return [array.tobytes() for array in self.arrays()]

    def spoil(self) -> None:
        for array in self.arrays():
            array[...] = np.nan


def alone(decoding: Decoding) -> list[bytes]:
    words = np.zeros((1, WIDTH), "i8")
    like, code = decoding.program.like, decoding.program.code
    play_together(like, code, decoding.rows, words, np.zeros((0, 1), like.dtype))
    return decoding.results()


class Helpers:
    """Threads, or none where they are to be missed."""

    def __init__(self, decoding: Decoding, count: int) -> None:
        self.decoding, like = decoding, decoding.program.like
        self.words = np.zeros((1 + count, WIDTH), "i8")
        self.words[1:, DONE] = GONE
        self.results = np.full((count, decoding.rows * 3 * CHANNELS), np.nan, like.dtype)
        self.threads: list[threading.Thread] = []

    def send(self) -> None:
        for helper in range(1, len(self.words)):
            if missing(self.decoding.program.code, self.words, helper):
                assert not missing(self.decoding.program.code, self.words, helper)
                self.threads.append(threading.Thread(target=self.help, args=(helper,)))
                self.threads[-1].start()

    def help(self, helper: int) -> None:
        program, rows = self.decoding.program, self.decoding.rows
        scratch = np.zeros(1 << 18, self.results.dtype)
        help_out(program.like, program.code, rows, self.words, helper, self.results, scratch)

    def play(self) -> list[bytes]:
        program = self.decoding.program
        self.decoding.spoil()
        play_together(program.like, program.code, self.decoding.rows, self.words, self.results)
        return self.decoding.results()

    def close(self) -> None:
        close_team(self.words)
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        assert (self.words[1:, DONE] == GONE).all()


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(1e-4)


@kinds
@rows_of
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts_make_up_the_whole(kind, dtype, rows, parts):
    """To the bit, in any order, written elsewhere and brought; nothing else is written."""
    decoding = Decoding(kind, dtype, rows)
    alone(decoding)
    like, code = decoding.program.like, decoding.program.code
    for i, result in zip((0, 1, 3, 4), decoding.arrays(), strict=True):
        whole = result.copy()
        result[...] = np.nan
        for part in range(parts)[::-1]:
            elsewhere = np.full_like(result, np.inf)
            size = do_part(like, code[i], rows, part, parts, elsewhere)
            written = size * HEAD_DIM if i == 1 else size * rows
            assert np.isfinite(elsewhere).sum() == written
        assert result.tobytes() == whole.tobytes()


@kinds
@rows_of
@pytest.mark.parametrize("helpers", [1, 2, 4])
def test_the_same_bits_as_alone(kind, dtype, rows, helpers):
    """Also with more threads than cores, again and again."""
    decoding = Decoding(kind, dtype, rows)
    wanted = alone(decoding)
    team = Helpers(decoding, helpers)

    def helped() -> bool:
        team.send()
        assert all(team.play() == wanted for _ in range(50))
        return bool(np.isfinite(team.results).any())

    until(helped)
    team.close()


def test_a_helper_that_never_comes():
    """It is waited for once, if it said that it was there, else not at all."""
    decoding = Decoding(CompiledOps, "f4", 2)
    wanted = alone(decoding)
    team = Helpers(decoding, 2)
    assert all(missing(decoding.program.code, team.words, helper) for helper in (1, 2))
    assert team.words[1:, DONE].tolist() == [COMING] * 2
    assert all(team.play() == wanted for _ in range(3))
    assert team.words[0, LATE] == 0
    team.words[1, DONE] = team.words[1, ASKED]
    assert all(team.play() == wanted for _ in range(3))
    assert team.words[0, LATE] == 1
    assert np.isnan(team.results).all()


def test_an_answer_to_an_older_question_is_none():
    """What a late helper left is not brought."""
    decoding = Decoding(CompiledOps, "f4", 2)
    wanted = alone(decoding)
    team = Helpers(decoding, 1)
    missing(decoding.program.code, team.words, 1)
    team.words[1, DONE] = team.words[1, ASKED] - 1
    team.results[...] = 7
    assert team.play() == wanted


def test_helpers_that_come_and_go_meanwhile():
    """While the leader plays without pause they are sent for, and let go."""
    decoding = Decoding(CompiledOps, "f4", 1)
    wanted = alone(decoding)
    team = Helpers(decoding, 1)
    for _ in range(20):
        team.send()
        assert all(team.play() == wanted for _ in range(20))
        team.close()
        assert team.play() == wanted


def test_a_helper_that_is_forgotten_returns():
    """Asked for nothing, within a second; then it can be sent for again."""
    team = Helpers(Decoding(CompiledOps, "f4", 1), 1)
    for count in (1, 2):
        team.send()
        assert len(team.threads) == count
        team.threads[-1].join(10)
        assert not team.threads[-1].is_alive()
        assert team.words[1, DONE] == GONE


def test_words():
    """At an index of the whole."""
    words = np.zeros((3, WIDTH), "i8")
    store_word_at(words, 2 * WIDTH + 5, -(2**40))
    assert words[2, 5] == -(2**40)
    assert np.count_nonzero(words) == 1
    assert load_word_at(words, 2 * WIDTH + 5) == -(2**40)
    close_team(words)
    assert words[:, ASKED].tolist() == [0, CLOSED, CLOSED]
