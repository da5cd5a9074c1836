"""The command line: `gpu-microgpt train|generate|evaluate|prepare|plot|bench`.

Exit codes: 0 done, 2 a mistake of the user's (one line on stderr), 130 and 143 interrupted.
Heavy modules are imported where they are used, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError


def train(arguments: Sequence[str]) -> int:
    """Train a model, or go on with a run."""
    from .config import Config, settings_help, shipped

    width = shutil.get_terminal_size((100, 24)).columns
    parser = _parser(
        train, "settings, each with default, meaning and type:\n" + settings_help(width)
    )
    names = ", ".join(shipped())
    parser.add_argument(
        "config", metavar="CONFIG", help=f"a YAML file, or a shipped one by name: {names}"
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="settings that differ: optimizer.lr=1e-3",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resulting settings and stop"
    )
    args = parser.parse_intermixed_args(arguments)
    config = Config.load(args.config, args.overrides)
    if args.print_config:
        print(config.to_yaml(), end="")
        return 0
    from .trainer import Trainer

    return Trainer(config).run()


def generate(arguments: Sequence[str]) -> int:
    """Write text with a trained model."""
    parser = _parser(generate)
    _add_checkpoint(parser)
    _add_prompt(parser)
    _add_sampling(parser)
    parser.add_argument("--no-stream", action="store_true", help="print when all is written")
    parser.add_argument("--json", action="store_true", help="print a list of {prompt, text}")
    args = parser.parse_intermixed_args(arguments)
    prompts = args.prompt or [_read(args.prompt_file) if args.prompt_file else ""]
    options = {
        name: getattr(args, name)
        for name in ("num_samples", "max_tokens", "temperature", "top_k", "top_p", "seed")
    }
    from .text_model import load

    model = load(args.path, which=args.checkpoint)
    if len(prompts) * args.num_samples == 1 and not (args.no_stream or args.json):
        for piece in model.stream(prompts[0], **options):
            print(piece, end="", flush=True)
        print()
        return 0
    texts = model.generate(prompts, **options)
    if args.json:
        asked = [prompt for prompt in prompts for _ in range(args.num_samples)]
        _print_json([{"prompt": p, "text": t} for p, t in zip(asked, texts, strict=True)])
    else:
        print(("\n" + "-" * 40 + "\n" if any("\n" in t for t in texts) else "\n").join(texts))
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Held-out loss, bits per character and perplexity of a checkpoint."""
    parser = _parser(evaluate)
    _add_checkpoint(parser)
    parser.add_argument("--data", metavar="FILE", help="another text than the held-out split")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_intermixed_args(arguments)
    from .evaluate import evaluate as measure

    figures = measure(args.path, data=args.data, which=args.checkpoint)
    if args.json:
        _print_json(figures)
        return 0
    for name, value in figures.items():
        shown = {int: "{:,}", float: "{:.4f}"}.get(type(value), "{}").format(value)
        print(f"{name.replace('_', ' '):<16} {shown}")
    return 0


def prepare(arguments: Sequence[str]) -> int:
    """Download and check texts ahead of training."""
    parser = _parser(prepare)
    parser.add_argument(
        "sources", metavar="SOURCE", nargs="+", help="names, shakespeare, a file or a URL"
    )
    args = parser.parse_intermixed_args(arguments)
    from .data.corpus import prepare as fetch

    fetch(args.sources, log=print)
    return 0


def plot(arguments: Sequence[str]) -> int:
    """Draw the loss curves of runs to a PNG file."""
    parser = _parser(plot)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("loss.png"),
        metavar="FILE",
        help="picture to write (loss.png)",
    )
    args = parser.parse_intermixed_args(arguments)
    from .plot import plot_runs

    plot_runs(args.runs, args.output)
    print(args.output)
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Measure the training step, alone or against PyTorch."""
    from .bench import bench as measure
    from .bench_setting import CASES

    parser = _parser(bench)
    parser.add_argument(
        "cases", metavar="CASE", nargs="*", help=f"which ({', '.join(CASES)}); all but baby-gpt"
    )
    parser.add_argument(
        "--against", metavar="PEER", help="also measure these, comma-separated: torch"
    )
    for flag, kind, default, meaning in (
        ("--rounds", _number(int, 1), 3, "how often the engines take turns"),
        ("--seconds", _number(float, 0), 4.0, "time for one measurement"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=f"{meaning} ({default})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write cpu.json and cpu.md there")
    args = parser.parse_intermixed_args(arguments)
    cases = args.cases or [case for case in CASES if case != "baby-gpt"]
    peers = args.against.split(",") if args.against else []
    print(measure(cases, peers, args.rounds, args.seconds, args.out), end="")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    command.__name__: command for command in (train, generate, evaluate, prepare, plot, bench)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code."""
    try:
        code = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except UserError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has gone: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as failure:
        if failure.filename is None:
            raise
        print(f"error: {failure.filename}: {failure.strerror}", file=sys.stderr)
        return 2
    except SystemExit as done:  # argparse, after printing help
        return int(done.code or 0)


def entry() -> NoReturn:
    """The installed `gpu-microgpt` command."""
    sys.exit(main())


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: gpu-microgpt COMMAND ...   (gpu-microgpt COMMAND --help says more)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<10} {command.__doc__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"wanted one of {', '.join(COMMANDS)}"
        raise UserError(f"{name}: no such command; {hint}")
    return COMMANDS[name](rest)


class _Parser(argparse.ArgumentParser):
    """Mistakes in one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists what there is)")


def _parser(command: Callable[[Sequence[str]], int], epilog: str = "") -> _Parser:
    return _Parser(
        prog=f"gpu-microgpt {command.__name__}",
        description=command.__doc__,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN", type=Path, help="a run's or a checkpoint's folder")
    parser.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        default="best",
        help="of a run: the one with the lowest held-out loss, or the last (best)",
    )


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help="go on from TEXT; repeat for more texts"
    )
    group.add_argument("--prompt-file", type=Path, metavar="FILE", help="go on from FILE's text")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
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
        (heat, "--temperature", _number(float, 0), 1.0, "X", "below 1 safer, above 1 wilder"),
        (parser, "--num-samples", _number(int, 1), 1, "N", "texts a prompt"),
        (parser, "--max-tokens", _number(int, 1), None, "N", text_length),
        (parser, "--top-k", _number(int, 0), 0, "K", "draw from the K likeliest tokens; 0: off"),
        (parser, "--top-p", _number(float, 0, 1), 1.0, "P", "draw from probability mass P; 1: off"),
        (parser, "--seed", _number(int, 0), 0, "N", "same seed, same text"),
    ):
        shown = "" if default is None else f" ({default})"
        group.add_argument(flag, type=kind, default=default, metavar=metavar, help=meaning + shown)


def _number(
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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as failure:
        raise UserError(f"{path}: cannot read the prompt: {failure.strerror}") from None
    except UnicodeDecodeError as failure:
        raise UserError(f"{path}: not UTF-8 text at byte {failure.start}") from None


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))
