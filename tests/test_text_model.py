"""Text from a trained model: batches, seeds, greedy, endings, lengths, prompts, loading."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_microgpt.backend import Backend, choose
from gpu_microgpt.checkpoint import load as load_state
from gpu_microgpt.config import Config
from gpu_microgpt.errors import CheckpointError, DataError, UserError
from gpu_microgpt.kv_cache import TOGETHER
from gpu_microgpt.text_model import TextModel, load
from tests.run_helpers import (
    LETTERS,
    QUIET,
    checkpoint,
    no_warning,
    saved,
    train,
    truncate,
    write_text,
)

PROMPTS = ["", "a", "abc", "abcdefgh", "hgfedcbahgfedcbaabc", "dd"]  # block_size is 8
LONGER = ["train.steps=60", "optimizer.lr=0.03", "checkpoint.interval=0", *QUIET]


@pytest.fixture(scope="module", params=["documents", "stream"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = tmp_path_factory.mktemp(request.param)
    return load(train(folder, f"data.mode={request.param}", *LONGER), warn=no_warning)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = tmp_path_factory.mktemp("stream")
    return load(train(folder, "data.mode=stream", *LONGER), warn=no_warning)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = tmp_path_factory.mktemp("documents")
    return load(train(folder, *LONGER), warn=no_warning)


def test_prompts_together_as_one_by_one(model: TextModel) -> None:
    """Whatever their lengths, and whatever else is asked for beside them."""
    options: dict[str, Any] = {"max_tokens": 30, "num_samples": 3, "seed": 5}
    together = model.generate(PROMPTS, **options)
    single = [text for prompt in PROMPTS for text in model.generate(prompt, **options)]
    assert together == single
    assert model.generate(PROMPTS[::-1], **options)[:3] == single[-3:]
    assert all(text.startswith(PROMPTS[i // 3]) for i, text in enumerate(together))


def test_more_texts_than_are_written_together(model: TextModel) -> None:
    many = model.generate("a", num_samples=TOGETHER + 3, max_tokens=5)
    assert len(many) == TOGETHER + 3
    assert many[:2] == model.generate("a", num_samples=2, max_tokens=5)
    assert len(set(many)) > TOGETHER // 2


def test_seed(model: TextModel) -> None:
    texts = [model.generate(num_samples=4, max_tokens=20, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len(set(texts[0])) > 1


@pytest.mark.parametrize("prompt", PROMPTS)
def test_stream_is_generate(model: TextModel, prompt: str) -> None:
    options: dict[str, Any] = {"num_samples": 2, "max_tokens": 20, "temperature": 0.8, "top_k": 5}
    pieces = list(model.stream(prompt, **options))
    assert "".join(pieces) == "".join(model.generate(prompt, **options))
    assert pieces[0] == prompt
    assert all(len(piece) <= 1 for piece in pieces[1:] if piece != prompt)


def test_streams_read_in_turn(model: TextModel) -> None:
    """None disturbs the other, whatever was written before."""
    options: dict[str, Any] = {"num_samples": 2, "max_tokens": 20}
    wanted = [list(model.stream("ab", seed=seed, **options)) for seed in range(2)]
    streams = [model.stream("ab", seed=seed, **options) for seed in range(2)]
    got = zip(*zip_longest(*streams), strict=True)
    assert [[piece for piece in pieces if piece is not None] for pieces in got] == wanted


def test_greedy(model: TextModel) -> None:
    """Temperature 0, the single likeliest token and a vanishing nucleus are the same."""
    greedy = model.generate(PROMPTS, temperature=0, max_tokens=20)
    assert model.generate(PROMPTS, top_k=1, max_tokens=20, seed=3) == greedy
    assert model.generate(PROMPTS, top_p=1e-9, max_tokens=20, seed=4) == greedy
    assert model.generate(PROMPTS, temperature=1e-3, max_tokens=20) == greedy
    assert model.generate(PROMPTS, max_tokens=20) != greedy


@pytest.mark.parametrize("temperature", [1e-30, 1e-44, 1e-320])
def test_next_to_greedy(model: TextModel, temperature: float) -> None:
    greedy = model.generate(PROMPTS, temperature=0, max_tokens=20)
    assert model.generate(PROMPTS, temperature=temperature, max_tokens=20) == greedy


def test_settings_that_are_off(model: TextModel) -> None:
    plain = model.generate(PROMPTS, max_tokens=20)
    vocabulary = len(LETTERS) + 2
    assert model.generate(PROMPTS, max_tokens=20, top_k=vocabulary + 5, top_p=1) == plain


def test_documents_end(documents: TextModel) -> None:
    """At BOS, which is no character, or at block_size tokens."""
    texts = documents.generate(num_samples=60)
    assert {len(text) for text in texts} >= {1, 2, 3, 8}
    assert max(map(len, texts)) == 8
    longer = documents.generate(num_samples=60, max_tokens=40)
    assert all(long.startswith(text) for text, long in zip(texts, longer, strict=True))
    assert all(long == text for text, long in zip(texts, longer, strict=True) if len(text) < 8)
    assert max(map(len, longer)) > 8
    assert set("".join(longer)) <= set(LETTERS)


def test_running_text_does_not_end(stream: TextModel) -> None:
    texts = stream.generate(num_samples=8, max_tokens=200, temperature=3.0)
    assert {len(text) for text in texts} == {200}  # a BOS would be no character
    assert set("".join(texts)) == {*LETTERS, "\n"}
    assert len(stream.generate()[0]) == 500


def test_running_text_begins_as_after_a_newline(stream: TextModel) -> None:
    [after] = stream.generate("\n", max_tokens=30)
    assert "\n" + stream.generate(max_tokens=30)[0] == after


def test_a_text_without_newlines(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcd " * 60, encoding="utf-8")
    model = load(train(tmp_path, "data.mode=stream", *QUIET), warn=no_warning)
    assert len(model.generate(max_tokens=20)[0]) == 20


@pytest.mark.parametrize("max_tokens", [1, 2, 8, 9])
def test_max_tokens(stream: TextModel, max_tokens: int) -> None:
    """Counts the new ones; and a shorter text is the beginning of a longer one."""
    texts = stream.generate(PROMPTS, max_tokens=max_tokens)
    longer = stream.generate(PROMPTS, max_tokens=30)
    for prompt, text, long in zip(PROMPTS, texts, longer, strict=True):
        assert len(text) == len(prompt) + max_tokens
        assert long.startswith(text)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"max_tokens": 0}, "max_tokens: got 0, wanted at least 1"),
        ({"temperature": -0.5}, "temperature: got -0.5, wanted"),
        ({"temperature": float("nan")}, "temperature: got nan, wanted"),
        ({"temperature": float("inf")}, "temperature: got inf, wanted"),
        ({"top_k": -1}, "top_k: got -1, wanted 0 (off) or more"),
        ({"top_p": 0.0}, "top_p: got 0.0, wanted above 0, at most 1 (off)"),
        ({"top_p": 1.5}, "top_p: got 1.5, wanted above 0, at most 1 (off)"),
    ],
)
def test_impossible_settings(model: TextModel, options: dict[str, Any], line: str) -> None:
    for write in (model.generate, lambda **given: list(model.stream(**given))):
        with pytest.raises(UserError) as error:
            write(**options)
        assert str(error.value).startswith(line)
        assert len(str(error.value).splitlines()) == 1


def test_unknown_characters_in_a_prompt(model: TextModel) -> None:
    for write in (model.generate, lambda prompt: list(model.stream(prompt))):
        with pytest.raises(DataError, match="prompt: got characters outside the vocab") as error:
            write("abc€Z\u2028")
        line = str(error.value)
        assert all(name in line for name in ("U+20AC", "U+005A", "U+2028", LETTERS))
        assert len(line.splitlines()) == 1


def test_no_prompts(model: TextModel) -> None:
    assert model.generate([]) == []


def test_best_and_last(tmp_path: Path) -> None:
    """The rate is absurd after the start, so that a middle checkpoint is the best."""
    write_text(tmp_path, count=40)
    every = ["train.eval_interval=3", "checkpoint.interval=3", "checkpoint.keep=9"]
    run = train(tmp_path, "optimizer.lr=0.3", "train.steps=30", *every)
    losses = {step: load_state(checkpoint(run, step)).meta["val_loss"] for step in saved(run)}
    lowest = min(losses, key=lambda step: losses[step])
    assert lowest != max(losses)
    for which, step in (("best", lowest), ("last", 30)):
        for path in (run, run / "checkpoints"):
            weights = load(path, which, warn=no_warning).gpt.params.named
            for name, array in load_state(checkpoint(run, step)).weights.items():
                assert np.array_equal(weights[name], array), (which, name)
    assert load(run, warn=no_warning).generate(temperature=0) == load(
        checkpoint(run, lowest), warn=no_warning
    ).generate(temperature=0)


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    run = train(tmp_path, *QUIET)
    truncate(checkpoint(run, 12) / "weights.safetensors")
    lines: list[str] = []
    model = load(run, "last", warn=lines.append)
    assert len(model.generate()) == 1
    assert len(lines) == 1
    assert str(checkpoint(run, 12)) in lines[0]
    for step in saved(run)[:-1]:
        truncate(checkpoint(run, step) / "state.json")
    with pytest.raises(CheckpointError, match="can be used"):
        load(run, warn=lines.append)


def test_moments_are_not_needed(tmp_path: Path) -> None:
    run = train(tmp_path, *QUIET)
    (checkpoint(run, 12) / "optimizer.safetensors").unlink()
    assert load(checkpoint(run, 12), warn=no_warning).generate()


def test_any_backend_and_the_first_device_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint may come from a machine with more GPUs."""
    run, asked = train(tmp_path, "backend=numpy", "device=3", *QUIET), list[Config]()

    def chosen(config: Config) -> Backend:
        asked.append(config)
        return choose(config)

    monkeypatch.setattr("gpu_microgpt.text_model.choose", chosen)
    assert load(run, warn=no_warning).generate()
    assert [(c.backend, c.device, c.dtype) for c in asked] == [("auto", 0, "auto")]


def test_double_precision_stays(tmp_path: Path) -> None:
    model = load(train(tmp_path, "dtype=fp64", *QUIET), warn=no_warning)
    assert model.gpt.params.flat.dtype == np.float64
