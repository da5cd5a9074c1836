"""Held-out loss of a checkpoint: on its own split, on another text, and when it cannot be had."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_microgpt import cli
from gpu_microgpt.activations import Activations
from gpu_microgpt.checkpoint import load as load_state
from gpu_microgpt.data.batch import pack
from gpu_microgpt.errors import DataError
from gpu_microgpt.evaluate import evaluate
from gpu_microgpt.text_model import TextModel, load
from tests.run_helpers import (
    QUIET,
    checkpoint,
    no_warning,
    rows,
    saved,
    share_every_step,
    train,
    truncate,
    words,
    write_text,
)

MODES = pytest.mark.parametrize("mode", ["documents", "stream"])


def reference(model: TextModel, sequences: list[np.ndarray[Any, Any]]) -> float:
    """Mean of -log p(next token), by one plain forward pass a sequence."""
    total, count = 0.0, 0
    for sequence in sequences:
        memory = Activations(model.gpt.dims, len(sequence) - 1, model.backend)
        logits = model.gpt.forward(memory, pack([sequence])).astype(np.float64)
        top = logits.max(-1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        total -= log_p[np.arange(len(logits)), sequence[1:]].sum()
        count += len(logits)
    return total / count


def windows(model: TextModel, text: str) -> list[np.ndarray[Any, Any]]:
    size, ids = model.config.model.block_size, model.tokenizer.encode(text)
    return [ids[i : i + size + 1] for i in range(0, len(ids) - 1, size)]


def lines(model: TextModel, text: str) -> list[np.ndarray[Any, Any]]:
    bos, size = model.tokenizer.bos, model.config.model.block_size
    whole = [[bos, *model.tokenizer.encode(line), bos] for line in text.split()]
    return [np.array(tokens[: size + 1]) for tokens in whole]


@MODES
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_own_split_is_the_trainers_own_figure(
    mode: str, threads: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, for every checkpoint with one."""
    share_every_step(monkeypatch)
    run = train(tmp_path, f"data.mode={mode}", f"threads={threads}", f"dtype={dtype}")
    reported = {row["step"]: row["loss/val"] for row in rows(run) if "loss/val" in row}
    assert reported.keys() == {4, 8, 12}
    for step in reported.keys() & set(saved(run)):
        assert evaluate(checkpoint(run, step), warn=print)["loss"] == reported[step]
    last = evaluate(run, which="last", warn=print)
    assert (last["loss"], last["step"]) == (reported[12], 12)
    assert evaluate(run, warn=print)["loss"] == min(reported.values())


@MODES
def test_figures(mode: str, tmp_path: Path) -> None:
    """The loss of a plain forward pass over what was held out, and what follows from it."""
    run = train(tmp_path, f"data.mode={mode}", *QUIET)
    model = load(run, warn=no_warning)
    figures = evaluate(run, warn=print)
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    if mode == "stream":
        held = windows(model, text[len(text) - round(0.1 * len(text)) :])
        assert figures["loss"] == pytest.approx(reference(model, held), rel=1e-6)
        assert figures["tokens"] == round(0.1 * len(text)) - 1
    else:
        assert 8 * 2 <= figures["tokens"] <= 8 * 8  # a tenth of 80 documents
    assert figures["bits_per_char"] == figures["loss"] / math.log(2)
    assert figures["perplexity"] == math.exp(figures["loss"])
    assert figures["data"] == f"{tmp_path / 'text.txt'} (held out)"
    assert (figures["checkpoint"], figures["step"]) == (str(run), 12)


@MODES
def test_another_file(mode: str, tmp_path: Path) -> None:
    """All of it, each token once."""
    run = train(tmp_path, f"data.mode={mode}", *QUIET)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(words(30, seed=9)), encoding="utf-8")
    model = load(run, warn=no_warning)
    text = other.read_text(encoding="utf-8")
    sequences = windows(model, text) if mode == "stream" else lines(model, text)
    figures = evaluate(run, str(other), warn=print)
    assert figures["tokens"] == sum(len(s) - 1 for s in sequences)
    assert figures["loss"] == pytest.approx(reference(model, sequences), rel=1e-6)
    assert figures["data"] == str(other)


@pytest.mark.parametrize("text", ["ab", "abcdefg", "abcdefgh", "abcdefgha"])
def test_a_very_short_file(text: str, tmp_path: Path) -> None:
    """Shorter than a window: one short window."""
    run = train(tmp_path, "data.mode=stream", *QUIET)
    (tmp_path / "short.txt").write_text(text, encoding="utf-8")
    figures = evaluate(run, str(tmp_path / "short.txt"), warn=print)
    model = load(run, warn=no_warning)
    assert figures["tokens"] == len(text) - 1
    assert figures["loss"] == pytest.approx(reference(model, windows(model, text)), rel=1e-6)


def test_a_file_of_one_document(tmp_path: Path) -> None:
    run = train(tmp_path, *QUIET)
    (tmp_path / "short.txt").write_text("a", encoding="utf-8")
    assert evaluate(run, str(tmp_path / "short.txt"), warn=print)["tokens"] == 2


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"a", "got 1 characters to train on"),
        (b"", "got an empty file"),
        (b"ab\xff", "wanted UTF-8 text"),
        ("abc€".encode(), r"got characters outside the vocabulary: .*U\+20AC"),
    ],
)
def test_a_file_that_cannot_be_scored(content: bytes, line: str, tmp_path: Path) -> None:
    run = train(tmp_path, "data.mode=stream", *QUIET)
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=line) as error:
        evaluate(run, str(file), warn=print)
    assert str(file) in str(error.value)


def test_nothing_was_held_out(tmp_path: Path) -> None:
    run = train(tmp_path, "data.val_fraction=0", *QUIET)
    with pytest.raises(DataError, match="held nothing out; name a text to score with --data FILE"):
        evaluate(run, warn=print)
    assert evaluate(run, str(tmp_path / "text.txt"), warn=print)["tokens"] > 80


def test_the_text_has_changed(tmp_path: Path) -> None:
    run = train(tmp_path, *QUIET)
    file = write_text(tmp_path, seed=2)
    with pytest.raises(DataError, match="no longer the text this run was trained on") as error:
        evaluate(run, warn=print)
    assert str(file) in str(error.value)
    file.unlink()
    with pytest.raises(DataError, match="no such file"):
        evaluate(run, warn=print)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run = train(tmp_path, *QUIET)
    truncate(checkpoint(run, 12) / "weights.safetensors")
    seen: list[str] = []
    assert evaluate(run, which="last", warn=seen.append)["step"] == 10
    assert [line for line in seen if "skipped" in line] == seen[:1]
    assert str(checkpoint(run, 12)) in seen[0]


def test_settings_of_the_run_that_do_not_matter(tmp_path: Path) -> None:
    """Few evaluation batches while training, accumulation, a place to resume from."""
    run = train(tmp_path, "train.eval_batches=1", "train.grad_accum=3", "resume=auto")
    full = evaluate(run, which="last", warn=print)
    plain = train(tmp_path, "run.name=plain", "train.grad_accum=3")
    assert full["loss"] == evaluate(plain, which="last", warn=print)["loss"]
    assert load_state(checkpoint(run, 12)).meta["val_loss"] != full["loss"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path)
    wanted = evaluate(run, which="last", warn=print)
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--checkpoint", "last", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == wanted
    assert cli.main(["evaluate", str(run), "--checkpoint", "last"]) == 0
    out = capsys.readouterr().out
    assert f"loss             {wanted['loss']:.4f}" in out
    assert f"perplexity       {wanted['perplexity']:.4f}" in out
