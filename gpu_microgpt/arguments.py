"""How the commands take their arguments: mistakes in one line, options that several share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from .errors import UserError

BACKENDS = ("auto", "numpy", "cupy")


class Parser(argparse.ArgumentParser):
    """Mistakes in one line, like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError, where argparse would print its usage and exit."""
        raise UserError(f"{message} ({self.prog} --help lists what there is)")


def parser_for(command: Callable[[Sequence[str]], int], epilog: str = "") -> Parser:
    """A parser for one command, named and described after its function."""
    return Parser(
        prog=f"gpu-microgpt {command.__name__}",
        description=command.__doc__,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Which model, and on what: `path`, `checkpoint`, `backend`, `dtype`."""
    parser.add_argument("path", metavar="RUN", type=Path, help="a run's or a checkpoint's folder")
    parser.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        default="best",
        help="of a run: the one with the lowest held-out loss, or the last (best)",
    )
    add_setting(parser, "--backend", BACKENDS)
    add_setting(parser, "--dtype", ("auto", "fp32", "fp64", "tf32", "bf16"))


def add_setting(parser: argparse.ArgumentParser, flag: str, choices: Sequence[str]) -> None:
    """A setting that has words as its values, the first of which is the default."""
    meaning = f"as in a settings file ({choices[0]})"
    parser.add_argument(flag, choices=choices, default=choices[0], help=meaning)


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """What to go on from: `prompt` (a list) or `prompt_file`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help="go on from TEXT; repeat for more texts"
    )
    group.add_argument("--prompt-file", type=Path, metavar="FILE", help="go on from FILE's text")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How to draw: temperature, num_samples, max_tokens, top_k, top_p, seed."""
    heat = parser.add_mutually_exclusive_group()
    heat.add_argument(
        "--greedy",
        dest="temperature",
        action="store_const",
        const=0.0,
        default=argparse.SUPPRESS,  # --temperature has the default
        help="likeliest token only",
    )
    text_length = "longest text (the context length for documents, 500 for running text)"
    for group, flag, kind, default, metavar, meaning in (
        (heat, "--temperature", number(float, 0), 1.0, "X", "below 1 safer, above 1 wilder"),
        (parser, "--num-samples", number(int, 1), 1, "N", "texts a prompt"),
        (parser, "--max-tokens", number(int, 1), None, "N", text_length),
        (parser, "--top-k", number(int, 0), 0, "K", "draw from the K likeliest tokens; 0: off"),
        (parser, "--top-p", number(float, 0, 1), 1.0, "P", "draw from probability mass P; 1: off"),
        (parser, "--seed", number(int, 0), 0, "N", "same seed, same text"),
    ):
        shown = "" if default is None else f" ({default})"
        group.add_argument(flag, type=kind, default=default, metavar=metavar, help=meaning + shown)


def add_measuring(
    parser: argparse.ArgumentParser, rows: Iterable[str], peers: Iterable[str]
) -> None:
    """What to measure, and how long: rows, against (lists), rounds, seconds, out."""
    for flag, metavar, meaning in (
        ("--rows", "ROW,...", f"which ({', '.join(rows)}); all"),
        ("--against", "PEER,...", f"also measure these: {', '.join(peers)}"),
    ):
        parser.add_argument(flag, type=_list, default=[], metavar=metavar, help=meaning)
    for flag, kind, default, meaning in (
        ("--rounds", number(int, 1), 3, "how often the engines take turns"),
        ("--seconds", number(float, 0), 2.0, "time for one measurement of a step"),
    ):
        parser.add_argument(
            flag, type=kind, default=default, metavar="N", help=f"{meaning} ({default:g})"
        )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write cpu.json and cpu.md there")


def _list(text: str) -> list[str]:
    """Names between commas."""
    return [name for name in text.split(",") if name]


def number(
    kind: type[int] | type[float], low: float, high: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: a number in [low, high]."""
    what = {int: "an integer", float: "a number"}[kind]
    wanted = f"{what} >= {low}" if high == math.inf else f"{what} from {low} to {high}"

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # nan is neither
            raise argparse.ArgumentTypeError(f"got {text}, wanted {wanted}")
        return value

    return convert
