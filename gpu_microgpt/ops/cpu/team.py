"""A program played by several threads: one leads, helpers do parts of what has parts.

Between tokens a core then keeps its part of the weights in its own L2 cache. A token of a small
model is some twenty products of a microsecond or two each, so a helper is told by a word of memory
that it watches (a number in it: which instruction), and answers by another; that takes a fraction
of a microsecond, and no lock.

The system may take a helper's core away at any moment, or never give it one. So:

- The leader never needs a helper. A part that is not done in time the leader does itself; a helper
  that has not answered yet is asked for nothing more until it has.
- A helper writes into memory of its own, from which the leader copies what was answered. What comes
  too late is read by nobody; it was computed from memory that may have changed meanwhile, but that
  stays there.
- A helper that is asked for nothing for a while, or finds the team closed, returns.

    words (1 + helpers, WIDTH) int64: row 0 counts what was played, another row is a helper's

atomics.py says what they are.
"""

from __future__ import annotations

from typing import Any

from .atomics import WIDTH, load_word, pause, store_word
from .code import flush_subnormals, restore_floats
from .compile import compiled
from .parts import bring_part, can_be_shared, instruction, play_part, scratch_of
from .play import perform, play
from .vector import at, place

COUNT, LATE = 0, 16  # where in row 0: what was played; how often an answer did not come in time
ASKED, DONE = 0, 16  # in a helper's: what the leader asks for; the answer
CLOSED, GONE, COMING = -1, -2, -3  # asked for nothing more; has returned; was sent for
# A pause takes 10 to 50 ns, so that these are 20 to 100 us, and 0.5 to 2.5 ms
PATIENCE = 2_000  # pauses until the leader does without a helper
IDLE = 50_000  # pauses until a helper that is asked for nothing returns


@compiled
def missing(program: Any, words: Any, helper: Any) -> Any:
    """Whether a helper is to be sent for, as it has returned or never came.

    It is asked for an instruction behind the program's last, to say that it is there.
    """
    if load_word(words, helper * WIDTH + DONE) != GONE:
        return False
    words[0, COUNT] += 1
    number = words[0, COUNT] * (len(program) + 1) + len(program)
    store_word(words, helper * WIDTH + DONE, COMING)
    store_word(words, helper * WIDTH + ASKED, number)
    return True


@compiled
def close_team(words: Any) -> None:
    """Let all helpers return."""
    for helper in range(1, len(words)):
        store_word(words, helper * WIDTH + ASKED, CLOSED)


@compiled
def play_together(like: Any, program: Any, rows: Any, words: Any, results: Any) -> None:
    """As `play`, over `rows` rows that are as many sequences; results: see `help_out`."""
    if len(words) == 1:
        play(like, program, rows, rows)
        return
    words[0, COUNT] += 1
    floats = flush_subnormals(like)
    for i in range(len(program)):
        a = instruction(program, i)
        if can_be_shared(a):
            number = words[0, COUNT] * (len(program) + 1) + i
            _share(like, a, rows, words, results, number)
        else:
            perform(like, a, rows, rows)
    restore_floats(floats)


@compiled
def _share(like: Any, a: Any, rows: Any, words: Any, results: Any, number: Any) -> None:
    """Do instruction a, called `number`, with those helpers who have answered all they were asked.

    Who is asked for it does the part of its own number; all others are the leader's.
    """
    parts = len(words)
    y, scratch = place(like, a[1]), scratch_of(like, a)
    for helper in range(1, parts):
        asked = words[helper, ASKED]
        if asked != CLOSED and load_word(words, helper * WIDTH + DONE) == asked:
            store_word(words, helper * WIDTH + ASKED, number)
    for part in range(parts):
        if part == 0 or words[part, ASKED] != number:
            play_part(like, a, rows, part, parts, y, scratch)
    for part in range(1, parts):
        if words[part, ASKED] == number:
            if _answered(words, part, number):
                bring_part(like, a, rows, part, parts, at(results, (part - 1) * results.shape[1]))
            else:
                words[0, LATE] += 1
                play_part(like, a, rows, part, parts, y, scratch)


@compiled
def _answered(words: Any, helper: Any, number: Any) -> Any:
    """Wait for a helper's answer; whether it came in time."""
    for _ in range(PATIENCE):
        if load_word(words, helper * WIDTH + DONE) == number:
            return True
        pause()
    return False


@compiled
def help_out(
    like: Any, program: Any, rows: Any, words: Any, helper: Any, results: Any, scratch: Any
) -> None:
    """What a helper does, from 1 on: its parts, until the team is closed or forgets it.

    results (helpers, largest result) floats: where they leave what they did. scratch: a place, the
    helper's own.
    """
    y, parts = at(results, (helper - 1) * results.shape[1]), len(words)
    done, idle, floats = load_word(words, helper * WIDTH + DONE), 0, flush_subnormals(like)
    while idle < IDLE:
        number = load_word(words, helper * WIDTH + ASKED)
        if number == CLOSED:
            break
        if number == done:
            pause()
            idle += 1
            continue
        i = number % (len(program) + 1)
        if i < len(program):
            play_part(like, instruction(program, i), rows, helper, parts, y, scratch)
        store_word(words, helper * WIDTH + DONE, number)
        done, idle = number, 0
    restore_floats(floats)
    store_word(words, helper * WIDTH + DONE, GONE)
