"""The command line: what it passes on, what it prints, how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_microgpt import cli
from gpu_microgpt.config import Config
from gpu_microgpt.errors import CheckpointError

ROOT = Path(__file__).parents[1]


class FakeModel:
    """Answers with what it was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.loaded: tuple[Path, str] | None = None
        self.on: tuple[str, str] | None = None  # backend, dtype
        self.ending = ""
        self.config = SimpleNamespace(data=SimpleNamespace(mode="stream"))

    def generate(self, prompts: list[str], **options: Any) -> list[str]:
        self.asked = {"prompts": prompts, **options}
        count = options["num_samples"]
        return [f"{p}{n}{self.ending}" for p in prompts for n in range(count)]

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        self.asked = {"prompt": prompt, **options}
        yield from (prompt, "é", "!")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()

    def load(path: Path, which: str, *, backend: str, dtype: str) -> FakeModel:
        fake.loaded, fake.on = (path, which), (backend, dtype)
        return fake

    monkeypatch.setattr("gpu_microgpt.text_model.load", load)
    return fake


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    configs: list[Config] = []

    class Trainer:
        def __init__(self, config: Config) -> None:
            configs.append(config)

        def run(self) -> int:
            return 143 if configs[0].seed == 143 else 0

    module: Any = SimpleNamespace(Trainer=Trainer)
    monkeypatch.setitem(sys.modules, "gpu_microgpt.trainer", module)
    return configs


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which the command ends, exit code 2."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_train_passes_the_settings_on_and_the_exit_code_back(trained: list[Config]) -> None:
    assert cli.main(["train", "names", "seed=143", "resume=auto"]) == 143
    assert trained == [Config.load("names", ["seed=143", "resume=auto"])]


def test_print_config_may_stand_anywhere_and_trains_nothing(
    trained: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = Config.load("names", ["seed=1", "train.steps=2"]).to_yaml()
    for arguments in (
        ["names", "seed=1", "train.steps=2", "--print-config"],
        ["names", "--print-config", "seed=1", "train.steps=2"],
        ["--print-config", "names", "seed=1", "train.steps=2"],
    ):
        assert cli.main(["train", *arguments]) == 0
        assert capsys.readouterr().out == expected
    assert not trained


def test_train_help_lists_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "KEY=VALUE" in out
    assert "model.n_layer" in out
    assert "run.dir" in out


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_bare_command_lists_the_commands(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("train", "generate", "evaluate", "prepare", "plot"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("trian names", "trian: no such command; did you mean train?"),
        ("fly", "fly: no such command; wanted one of train, generate, evaluate, prepare, plot"),
        ("train", "the following arguments are required: CONFIG (gpu-microgpt train --help"),
        ("train names --sed=3", "unrecognized arguments: --sed=3"),
        ("train names model.n_layr=3", "command line: model.n_layr: unknown key; did you mean"),
        ("train nowhere.yaml", "nowhere.yaml: no such settings file"),
        ("generate", "required: RUN"),
        ("generate x --num-samples 0", "--num-samples: got 0, wanted an integer >= 1"),
        ("generate x --num-samples 1.5", "--num-samples: got 1.5, wanted an integer >= 1"),
        ("generate x --temperature nan", "--temperature: got nan, wanted a number >= 0"),
        ("generate x --top-p 2", "--top-p: got 2, wanted a number from 0 to 1"),
        ("generate x --greedy --temperature 1", "not allowed with argument"),
        ("generate x --prompt a --prompt-file b", "not allowed with argument"),
        ("generate x --prompt-file no/such", "no/such: cannot read the prompt: No such file"),
        ("generate x --checkpoint first", "invalid choice: 'first'"),
        ("prepare", "required: SOURCE"),
        ("prepare no/such.txt", "no/such.txt"),
        ("plot", "required: RUN"),
    ],
)
def test_mistakes(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, *arguments.split())


def test_prompt_file_must_be_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(b"ab\xff")
    line = refused(capsys, "generate", "x", "--prompt-file", str(file))
    assert f"{file}: not UTF-8 text at byte 2" in line


def test_generate_streams_one_text(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "generate runs/x --prompt Ro --max-tokens 9 --top-k 5 --top-p 0.9 --seed 3"
    assert cli.main([*arguments.split(), "--temperature", "0.7", "--checkpoint", "last"]) == 0
    assert capsys.readouterr().out == "Roé!\n"
    assert model.asked == {"prompt": "Ro", "num_samples": 1, "max_tokens": 9, "temperature": 0.7,
                           "top_k": 5, "top_p": 0.9, "seed": 3}  # fmt: skip
    assert model.loaded == (Path("runs/x"), "last")


def test_generate_defaults(model: FakeModel) -> None:
    assert cli.main(["generate", "runs/x"]) == 0
    assert model.asked == {"prompt": "", "num_samples": 1, "max_tokens": None, "temperature": 1.0,
                           "top_k": 0, "top_p": 1.0, "seed": 0}  # fmt: skip
    assert model.loaded == (Path("runs/x"), "best")
    assert model.on == ("auto", "auto")
    assert cli.main(["generate", "runs/x", "--backend", "numpy", "--dtype", "fp64"]) == 0
    assert model.on == ("numpy", "fp64")


def test_generate_many(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "generate x --prompt a --prompt bc --num-samples 2 --greedy"
    assert cli.main(arguments.split()) == 0
    assert capsys.readouterr().out == "a0\na1\nbc0\nbc1\n"
    assert (model.asked["prompts"], model.asked["temperature"]) == (["a", "bc"], 0.0)
    model.ending = "\nEnd"
    assert cli.main(arguments.split()) == 0
    assert capsys.readouterr().out.split("\n" + "-" * 40 + "\n") == [
        "a0\nEnd", "a1\nEnd", "bc0\nEnd", "bc1\nEnd\n"]  # fmt: skip


def test_generate_json(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "x", "--json", "--prompt=é", "--prompt=b", "--num-samples=2"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"prompt": "é", "text": "é0"}, {"prompt": "é", "text": "é1"},
        {"prompt": "b", "text": "b0"}, {"prompt": "b", "text": "b1"},
    ]  # fmt: skip


def test_generate_reads_the_prompt_from_a_file(model: FakeModel, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("ROMEO:\n", encoding="utf-8")
    assert cli.main(["generate", "x", "--prompt-file", str(tmp_path / "prompt")]) == 0
    assert model.asked["prompt"] == "ROMEO:\n"


def test_evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def evaluate(
        path: Path, data: str | None, which: str, *, backend: str, dtype: str
    ) -> dict[str, Any]:
        on.append((backend, dtype))
        return {"loss": 1.5, "bits_per_char": 2.16, "tokens": 1234567, "data": data or which}

    on: list[tuple[str, str]] = []

    fake: Any = SimpleNamespace(evaluate=evaluate)
    monkeypatch.setitem(sys.modules, "gpu_microgpt.evaluate", fake)
    assert cli.main(["evaluate", "runs/x", "--checkpoint", "last"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["loss", "1.5000"], ["bits", "per", "char", "2.1600"], ["tokens", "1,234,567"],
        ["data", "last"],
    ]  # fmt: skip
    assert cli.main(["evaluate", "runs/x", "--data", "my.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == "my.txt"
    assert cli.main(["evaluate", "runs/x", "--backend", "cupy", "--dtype", "tf32"]) == 0
    assert on == [("auto", "auto"), ("auto", "auto"), ("cupy", "tf32")]


def test_prepare_names_what_it_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.txt").write_text("hello\n", encoding="utf-8")
    assert cli.main(["prepare", str(tmp_path / "my.txt")]) == 0
    assert str(tmp_path / "my.txt") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (CheckpointError("x: no checkpoint"), 2, "error: x: no checkpoint\n"),
        (
            PermissionError(13, "Permission denied", "runs/x"),
            2,
            "error: runs/x: Permission denied\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_failures_end_in_one_line(
    failure: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: Any) -> int:
        raise failure

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == line


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: Any) -> int:
        raise ZeroDivisionError

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["train", "generate", "evaluate", "prepare", "plot", "doctor"])
def test_scripts_run_their_command(name: str) -> None:
    done = python(f"scripts/{name}.py", "--help", env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: gpu-microgpt {name} ")


def test_help_loads_no_heavy_module() -> None:
    code = (
        "import sys; from gpu_microgpt.cli import main; code = main(['train', '--help']);"
        "heavy = {'numpy', 'tensorboard', 'requests', 'matplotlib', 'cupy'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_run_loads_only_what_it_needs(tmp_path: Path) -> None:
    """Not what fetches texts, draws pictures or curves: it would be waited for at every start."""
    code = (
        "import sys; from gpu_microgpt.cli import main;"
        "code = main(['train', *sys.argv[1:]]);"
        "early = {'requests', 'PIL', 'matplotlib', 'cupy'} & set(sys.modules);"
        "sys.exit(str(early) if early else code)"
    )
    overrides = ["data.source=stdlib-words", "train.steps=1", f"run.dir={tmp_path}"]
    done = python("-c", code, "names", *overrides, "backend=numpy")
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    code = (
        "import sys; from gpu_microgpt import cli;"
        "cli.COMMANDS['train'] = lambda rest: print('x' * 10**6) or 0; cli.entry()"
    )
    pipe = f'"{sys.executable}" -c "{code}" train | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", pipe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "x", "")
