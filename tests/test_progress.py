from __future__ import annotations

import io
import os
import sys

import pytest

from gpu_microgpt.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines a terminal shows: after a carriage return text is written over."""
        lines = []
        for line in self.getvalue().replace("\x1b[A", "").split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


def train(progress: Progress, first: int, last: int) -> None:
    for step in range(first, last + 1):
        progress.advance(step)
        if step % 10 == 0:
            progress.update(step, 2.5, 12345.6, 8.25, 3e-4)
        if step == 15:
            progress.log("saved step 15")


def test_a_bar_with_messages_above_it() -> None:
    terminal = Terminal()
    with Progress(40, 10, terminal) as progress:
        train(progress, 11, 40)
    *above, bar, end = terminal.screen()
    assert above == ["saved step 15"]
    assert bar.startswith("100%|")
    assert " 40/40 [" in bar
    assert bar.endswith("loss 2.5000, 12,346 tokens/s]")
    assert end == ""


def test_a_stopped_bar_stays_at_its_step() -> None:
    terminal = Terminal()
    progress = Progress(40, 10, terminal)
    train(progress, 11, 20)
    progress.close()
    progress.close()
    progress.log("goodbye")
    assert " 50%|" in terminal.screen()[-3]
    assert terminal.screen()[-2:] == ["goodbye", ""]


def test_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Progress(1040, 10, stream) as progress:
        train(progress, 11, 40)
    assert stream.getvalue().splitlines() == [
        "saved step 15",
        *(
            f"step   {step}/1040  loss 2.5000  lr 3.00e-04  12,346 tokens/s  8.25 ms/step  "
            "time left 0:00:08"
            for step in (20, 30, 40)
        ),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_lines_on_a_terminal_of_no_width() -> None:
    screen, terminal = os.openpty()  # its size is 0 x 0
    with open(terminal, "w") as stream, Progress(40, 0, stream) as progress:
        progress.update(10, 2.5, 12345.6, 8.25, 3e-4)
    assert os.read(screen, 1000).startswith(b"step 10/40  loss 2.5000")
    os.close(screen)
