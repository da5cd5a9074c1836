"""Settings: what is shipped holds, what is wrong is told in one line that names everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest

from gpu_microgpt.config import Config, settings_help, shipped
from gpu_microgpt.errors import ConfigError
from gpu_microgpt.settings import fields

SMALL: dict[str, Any] = {
    "model": {"n_layer": 1, "n_head": 4, "n_embd": 16, "block_size": 16},
    "data": {"source": "names", "mode": "documents"},
    "train": {"steps": 1000, "batch_size": 1},
    "optimizer": {"lr": 0.01},
}


def complaint(*overrides: str, file: str | Path = "names") -> str:
    with pytest.raises(ConfigError) as caught:
        Config.load(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, content: str | bytes, name: str = "my.yaml") -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


# --- the shipped files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped())
def test_shipped_settings_load_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = Config.load(name)
    assert config.run.name == name
    stored = write(tmp_path, config.to_yaml(), "config.yaml")
    assert Config.load(stored) == config  # the run keeps its name, not the file's
    assert Config.from_dict(config.to_dict()) == config


def test_shipped_settings_are_the_published_ones() -> None:
    assert set(shipped()) >= {"names", "microgpt", "shakespeare", "baby_gpt"}
    original = Config.load("microgpt")
    assert (original.seed, original.rng, original.dtype) == (42, "microgpt", "fp64")
    assert (original.train.steps, original.train.batch_size) == (1000, 1)
    assert original.optimizer.betas == (0.85, 0.99)
    assert (original.optimizer.lr, original.optimizer.eps) == (0.01, 1e-8)
    assert original.data.fallback is None
    assert (original.sample.num, original.sample.temperature) == (20, 0.5)
    play = Config.load("shakespeare")
    assert (play.model.n_embd, play.model.n_layer) == (128, 4)
    assert (play.train.steps, play.train.batch_size, play.data.val_fraction) == (2040, 32, 0.1)
    assert (play.data.fallback, Config.load("names").data.fallback) == ("stdlib", "stdlib-words")


# --- reading ------------------------------------------------------------------------------------


def test_run_is_named_after_its_file(tmp_path: Path) -> None:
    body = Config.from_dict(SMALL).to_dict()
    for run in ({"dir": "runs"}, {}, None):  # JSON is YAML
        file = write(tmp_path, json.dumps(body | {"run": run}), "my-poems.yaml")
        assert Config.load(file).run.path == Path("runs/my-poems")
    assert Config.load(file, ["run.name=x"]).run.path == Path("runs/x")


def test_overrides_are_yaml_and_leave_the_given_values_alone() -> None:
    before = repr(SMALL)
    config = Config.from_dict(
        SMALL,
        ["optimizer.lr=1e-3", "optimizer.eps=1E-9", "optimizer.betas=[0.9, 95e-2]", "train.steps=7",
         "train.stop_at=7", "model.scale_residual_init=true", "resume=auto"],
    )  # fmt: skip
    assert (config.optimizer.lr, config.optimizer.eps) == (0.001, 1e-9)
    assert config.optimizer.betas == (0.9, 0.95)
    assert (config.train.steps, config.train.stop_at, config.resume) == (7, 7, "auto")
    assert config.model.scale_residual_init is True
    assert repr(SMALL) == before


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "10e-4", ".1e-2", "+1e-3", "0.001"])
def test_file_may_write_numbers_with_an_exponent(tmp_path: Path, text: str) -> None:
    body = Config.from_dict(SMALL).to_yaml().replace("lr: 0.01", f"lr: {text}")
    assert Config.load(write(tmp_path, body)).optimizer.lr == 0.001


@pytest.mark.parametrize(
    ("text", "value"),
    [("ROMEO:", "ROMEO:"), ("a: b", "a: b"), ("2024", "2024"), ("", ""), ("'tis", "'tis"),
     ('"a\\nb"', "a\nb"), ("null", "null"), ("[", "["), ("# 1", "# 1"), ("a=b", "a=b")],
)  # fmt: skip
def test_text_on_the_command_line_is_taken_as_it_stands(text: str, value: str) -> None:
    assert Config.from_dict(SMALL, [f"sample.prompt={text}"]).sample.prompt == value


def test_text_that_may_be_missing_takes_null() -> None:
    values = SMALL | {"resume": "auto"}
    assert Config.from_dict(values, ["resume=null"]).resume is None
    assert Config.from_dict(values, ["resume='null'"]).resume == "null"


def test_empty_section_takes_its_defaults() -> None:
    assert Config.from_dict(SMALL | {"sample": None, "schedule": None}) == Config.from_dict(SMALL)


def test_settings_are_frozen() -> None:
    config = Config.load("names")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.train.batch_size = 3


def test_help_lists_every_setting() -> None:
    text = settings_help(width=100)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for key, field in fields(Config).items():
        assert sum(line.split()[:1] == [key] for line in lines) == 1, key
        assert field.description, key
    squeezed = " ".join(text.split())
    assert "train.batch_size required samples" in squeezed
    assert "optimizer.eps 1e-08 added to the root of the mean square (number > 0)" in squeezed
    assert "(fp32|" not in squeezed
    assert "(auto|fp32|fp64|tf32|bf16)" in squeezed


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        # unknown keys
        ("model.n_layr=3", "model.n_layr: unknown key; did you mean model.n_layer?"),
        ("n_layer=3", "n_layer: unknown key; did you mean model.n_layer?"),
        ("train.lr=3", "train.lr: unknown key; did you mean optimizer.lr?"),
        ("schedule.nam=x", "schedule.nam: unknown key; did you mean schedule.name?"),
        ("optimiser.lr=3", "optimiser: unknown key; did you mean optimizer?"),
        ("train.zzz=3", "train.zzz: unknown key; known here: steps, epochs, batch_size,"),
        # types
        ("train.batch_size=abc", 'train.batch_size: got "abc", wanted integer >= 1'),
        ("train.batch_size=2.5", "train.batch_size: got 2.5, wanted integer >= 1"),
        ("train.batch_size=true", "train.batch_size: got true, wanted integer >= 1"),
        ("train.batch_size=", "train.batch_size: got null, wanted integer >= 1"),
        ("optimizer.lr=fast", 'optimizer.lr: got "fast", wanted number > 0'),
        ("model.scale_residual_init=1", "scale_residual_init: got 1, wanted true|false"),
        ("model=3", "model: got 3, wanted a section of n_layer, n_head,"),
        ("seed.x=3", 'seed: got {"x": 3}, wanted integer >= 0'),
        ("data.fallback=no", "data.fallback: got false, wanted stdlib|stdlib-words or null"),
        ("optimizer.betas=0.9", "optimizer.betas: got 0.9, wanted [number >= 0 and < 1, number"),
        ("optimizer.betas=[0.9]", "optimizer.betas: got [0.9], wanted [number >= 0 and < 1,"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas: got [0.9, 1], wanted [number >= 0 and"),
        ("optimizer.betas=[1, 2, 3]", "optimizer.betas: got [1, 2, 3], wanted [number >= 0"),
        # values
        ("dtype=fp16", 'dtype: got "fp16", wanted auto|fp32|fp64|tf32|bf16'),
        ("train.batch_size=0", "train.batch_size: got 0, wanted integer >= 1"),
        ("train.log_interval=0", "train.log_interval: got 0, wanted integer >= 1"),
        ("train.eval_interval=-1", "train.eval_interval: got -1, wanted integer >= 0"),
        ("optimizer.lr=-1", "optimizer.lr: got -1, wanted number > 0"),
        ("optimizer.lr=.nan", "optimizer.lr: got NaN, wanted number > 0"),
        ("optimizer.lr=.inf", "optimizer.lr: got Infinity, wanted number > 0"),
        ("optimizer.lr=1e400", "optimizer.lr: got Infinity, wanted number > 0"),
        ("data.val_fraction=1", "data.val_fraction: got 1, wanted number >= 0 and < 1"),
        ("schedule.warmup_fraction=2", "got 2, wanted number >= 0 and <= 1"),
        ("sample.top_p=0", "sample.top_p: got 0, wanted number > 0 and <= 1"),
        ("seed=-1", "seed: got -1, wanted integer >= 0 and < 2^64"),
        ("seed=18446744073709551616", "seed: got 18446744073709551616, wanted integer >= 0"),
        ("data.source=", 'data.source: got "", wanted text of length >= 1'),
        ("run.name=a/b", 'run.name: got "a/b", wanted a plain folder name'),
        ("run.name=..", 'run.name: got "..", wanted a plain folder name'),
        # values that clash
        ("model.n_embd=15", "model.n_embd: got 15 with model.n_head 4, wanted a multiple of n_h"),
        ("model.n_head=3", "model.n_embd: got 16 with model.n_head 3, wanted a multiple of n_h"),
        ("train.epochs=3", "train.steps: got 10000 with train.epochs 3, wanted exactly one"),
        ("train.steps=null", "train.steps: got null with train.epochs null, wanted exactly one"),
        ("train.stop_at=10001", "train.stop_at: got 10001 with train.steps 10000, wanted at most"),
        ("optimizer.weight_decay=0.1", 'got 0.1 with optimizer.name "adam", wanted 0, or optimiz'),
        ("schedule.min_lr=1", "schedule.min_lr: got 1.0 with optimizer.lr 0.01, wanted at most"),
        ("rng=microgpt", 'data.val_fraction: got 0.1 with rng "microgpt", wanted 0 (or rng philox'),
        # syntax
        ("steps", 'got "steps", wanted section.key=value'),
        ("=3", 'got "=3", wanted section.key=value'),
        ("train..steps=3", 'got "train..steps=3", wanted section.key=value'),
        ("--seed=3", 'got "--seed=3", wanted section.key=value'),
        ("seed=[", 'seed: got "[", not valid YAML: line 1: '),
        ("seed=2026-13-01", 'seed: got "2026-13-01", not valid YAML: month must be in'),
    ],
)
def test_bad_override(override: str, expected: str) -> None:
    line = complaint(override)
    assert line.startswith("command line: "), line
    assert expected in line


@pytest.mark.parametrize(
    "override", ["data.mode=stream", "data.order=random", "data.val_fraction=0.1"]
)
def test_microgpt_randomness_needs_its_kind_of_data(override: str) -> None:
    line = complaint(override, file="microgpt")
    assert line.startswith(f"command line: {override.partition('=')[0]}: got ")
    assert 'with rng "microgpt", wanted ' in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "got null, wanted sections of `key: value` settings"),
        ("- 1", "got [1], wanted sections"),
        ("a: b: c", "not valid YAML: line 1: mapping values are not allowed here"),
        ("model:\n  n_head: [1\n", "not valid YAML: line 3: "),
        ("model:\n  n_head: 1\n  n_head: 2\n", "not valid YAML: line 3: n_head stands here again"),
        ("seed: 2026-13-01", "not valid YAML: month must be in"),
        ("a: !!python/object:os.x {}", "not valid YAML: line 1: could not determine a constructor"),
        (b"\xff\xfe", "cannot read the settings: not UTF-8 text"),
        ("model: {n_layer: 1}", "model.n_head: missing, wanted integer >= 1 (and "),
        ("1: 2", "1: unknown key; known here: backend, "),
    ],
)
def test_bad_file(tmp_path: Path, content: str | bytes, expected: str) -> None:
    file = write(tmp_path, content)
    line = complaint(file=file)
    assert line.startswith(f"{file}: ")
    assert expected in line


def test_mistake_in_the_file_names_the_file_unless_overridden(tmp_path: Path) -> None:
    body = Config.from_dict(SMALL).to_yaml().replace("n_embd: 16", "n_embd: 18")
    file = write(tmp_path, body)
    assert complaint(file=file).startswith(f"{file}: model.n_embd: got 18 with model.n_head 4,")
    assert complaint("seed=3", file=file).startswith(f"{file}: ")
    assert complaint("model.n_head=5", file=file).startswith("command line: model.n_embd: got 18")


def test_unknown_key_comes_before_the_missing_one_it_explains() -> None:
    values = SMALL | {"train": {"steps": 1, "batchsize": 2}}
    with pytest.raises(ConfigError, match=r"here: train.batchsize: unknown key.*train.batch_size"):
        Config.from_dict(values, source="here")


@pytest.mark.parametrize("missing", ["nmes", "configs/nmes.yaml", "."])
def test_missing_file_names_the_shipped_ones(missing: str) -> None:
    line = complaint(file=missing)
    assert line.startswith(f"{missing}: no such settings file; ")
    assert "baby_gpt, microgpt, names, shakespeare" in line
