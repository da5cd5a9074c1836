"""The command line: `gpu-microgpt train|generate|evaluate|prepare|plot|bench|doctor`.

Exit codes: 0 done, 1 doctor found something wrong, 2 a mistake of the user's (one line on stderr),
130 and 143 interrupted, 141 nobody reads the output any more.
Heavy modules are imported where they are used, so that help and errors come at once.
"""

from __future__ import annotations

import difflib
import gc
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from .arguments import (
    BACKENDS,
    add_checkpoint,
    add_measuring,
    add_prompt,
    add_sampling,
    add_setting,
    number,
    parser_for,
)
from .errors import UserError


def train(arguments: Sequence[str]) -> int:
    """Train a model, or go on with a run."""
    from .config import Config, settings_help, shipped

    width = shutil.get_terminal_size((100, 24)).columns
    parser = parser_for(
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
    parser = parser_for(generate)
    add_checkpoint(parser)
    add_prompt(parser)
    add_sampling(parser)
    parser.add_argument("--no-stream", action="store_true", help="print when all is written")
    parser.add_argument("--json", action="store_true", help="print a list of {prompt, text}")
    args = parser.parse_intermixed_args(arguments)
    prompts = args.prompt or [_read(args.prompt_file) if args.prompt_file else ""]
    options = {
        name: getattr(args, name)
        for name in ("num_samples", "max_tokens", "temperature", "top_k", "top_p", "seed")
    }
    from .text_model import join_texts, load

    model = load(args.path, args.checkpoint, backend=args.backend, dtype=args.dtype)
    if model.config.data.mode == "documents":  # lines are stripped when they are read
        prompts = [prompt.strip() for prompt in prompts]
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
        print(join_texts(texts))
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Held-out loss, bits per character and perplexity of a checkpoint."""
    parser = parser_for(evaluate)
    add_checkpoint(parser)
    parser.add_argument("--data", metavar="FILE", help="another text than the held-out split")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_intermixed_args(arguments)
    from .evaluate import evaluate as measure

    figures = measure(args.path, args.data, args.checkpoint, backend=args.backend, dtype=args.dtype)
    if args.json:
        _print_json(figures)
        return 0
    for name, value in figures.items():
        shown = {int: "{:,}", float: "{:.4f}"}.get(type(value), "{}").format(value)
        print(f"{name.replace('_', ' '):<16} {shown}")
    return 0


def prepare(arguments: Sequence[str]) -> int:
    """Download and check texts ahead of training."""
    parser = parser_for(prepare)
    parser.add_argument(
        "sources", metavar="SOURCE", nargs="+", help="names, shakespeare, a file or a URL"
    )
    args = parser.parse_intermixed_args(arguments)
    from .data.corpus import prepare as fetch

    fetch(args.sources, log=print)
    return 0


def plot(arguments: Sequence[str]) -> int:
    """Draw the loss curves of runs to a PNG file."""
    parser = parser_for(plot)
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

    print(plot_runs(args.runs, args.output))
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Measure training and writing on the CPU, alone or against PyTorch and JAX."""
    from .bench_rows import PEERS, ROWS

    parser = parser_for(bench)
    add_measuring(parser, ROWS, PEERS)
    args = parser.parse_intermixed_args(arguments)
    from .bench import bench as measure

    print(measure(args.rows, args.against, args.rounds, args.seconds, args.out), end="")
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Tell whether this machine's speed and loss are what they should be."""
    parser = parser_for(doctor)
    add_setting(parser, "--backend", BACKENDS)
    parser.add_argument(
        "--threads", type=number(int, 0), default=0, metavar="N", help="CPU threads; 0: all (0)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found there")
    args = parser.parse_intermixed_args(arguments)
    from .doctor import Doctor

    patient = Doctor(args.backend, args.threads)
    for finding in patient.examine():
        print(finding, flush=True)
    diagnosis = patient.diagnosis
    if args.json:
        text = json.dumps(_plain(asdict(diagnosis)), indent=2)
        args.json.write_text(text + "\n", encoding="utf-8")
    print(f"{diagnosis.wrong or 'nothing'} wrong")
    return 1 if diagnosis.wrong else 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    command.__name__: command
    for command in (train, generate, evaluate, prepare, plot, bench, doctor)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without a letter shows its code
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except UserError as failure:
        return _fail(str(failure))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has gone: nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as failure:
        return _fail(f"{failure.filename or 'output'}: {failure.strerror}")
    except MemoryError:
        return _fail("out of memory: lower train.batch_size, or choose a smaller model or text")
    except SystemExit as done:  # argparse, after printing help
        return int(done.code or 0)


def _fail(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2


def entry(*command: str) -> NoReturn:
    """A process of its own: the installed `gpu-microgpt`, or a script, which gives its command.

    Starting makes hundreds of thousands of objects, nearly all of them to stay: looking through
    them for garbage time and again, and once more at the end, took a quarter of a short run.
    """
    gc.set_threshold(100_000, 50, 50)
    code = main([*command, *sys.argv[1:]])
    gc.freeze()
    sys.exit(code)


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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as failure:
        raise UserError(f"{path}: cannot read the prompt: {failure.strerror}") from None
    except UnicodeDecodeError as failure:
        raise UserError(f"{path}: not UTF-8 text at byte {failure.start}") from None


def _print_json(value: Any) -> None:
    print(json.dumps(_plain(value), indent=2, default=str))


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
