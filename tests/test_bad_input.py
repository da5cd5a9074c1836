"""Every mistake of a user's: one line that starts with `error:`, exit code 2, nothing lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from gpu_microgpt import cli
from gpu_microgpt.data.corpus import FOLDER_VARIABLE
from tests.run_helpers import (
    QUIET,
    ROOT,
    contents,
    environment,
    settings,
    settings_file,
    train,
    truncate,
)

MANY = "".join(map(chr, range(0x10000, 0x10000 + 65_536)))
TEXTS = {  # content of a corpus, what the line says
    "empty": (b"", "got an empty file (0 bytes), wanted text"),
    "blank": (b" \n\r\n\t\n", "got an empty file (6 bytes), wanted text"),
    "short": (b"abcdefgh", "wanted at least a window of block_size + 1 = 9"),
    "latin1": (b"abc\n" * 5 + b"caf\xe9", "got byte 0xe9 at offset 23, wanted UTF-8 text"),
    "utf16": (("abc\n" * 50).encode("utf-16"), "got byte 0xff at offset 0, wanted UTF-8 text"),
    "many": (MANY.encode(), "got 65,536 distinct characters and BOS, wanted at most 65,536 ids"),
}
SETTINGS = [
    ("model.n_layr=2", "model.n_layr: unknown key; did you mean model.n_layer?"),
    ("model.n_embd=9", "model.n_embd: got 9 with model.n_head 2, wanted a multiple of n_head"),
    ("train.batch_size=0", "train.batch_size: got 0, wanted integer >= 1"),
    ("optimizer.lr=-1", "optimizer.lr: got -1, wanted number > 0"),
    ("optimizer.lr=.nan", "optimizer.lr: got NaN"),
    ("train.steps=many", 'train.steps: got "many", wanted integer >= 1 or null'),
    ("train.epochs=3", "wanted exactly one of the two"),
    ("train.stop_at=13", "train.stop_at: got 13 with train.steps 12, wanted at most train.steps"),
    ("no-equals-sign", 'got "no-equals-sign", wanted section.key=value'),
    ("model.block_size=1000 data.mode=stream", "at least a window of block_size + 1 = 1,001"),
    ("data.val_fraction=0.999", "too few to hold out a share of 0.999"),
    ("data.val_fraction=0.001", "too few to hold out a share of 0.001"),
    ("data.source=no/such.txt", "data.source: got 'no/such.txt', no such file in "),
    ("data.source=nmes", "did you mean 'names'?"),
    ("data.source=.", "cannot be read: Is a directory"),
    ("data.source=http://127.0.0.1:9/x.txt", "http://127.0.0.1:9/x.txt: cannot be reached"),
    ("sample.prompt=abc€", "got characters outside the vocabulary: '\\u20ac' (U+20AC)"),
    ("backend=numpy dtype=tf32", "dtype: got tf32"),
    ("kernels=reference dtype=bf16", "dtype: got bf16, which needs compiled kernels"),
    ("backend=torch", 'backend: got "torch", wanted auto|numpy|cupy'),
    ("rng=microgpt", "data.val_fraction: got 0.1 with rng \"microgpt\", wanted 0"),
    ("resume=no/such/run", "no folder no/such/run: a run's folder or a checkpoint in it is wanted"),
    ("run.name=a/b", "run.name: got \"a/b\", wanted a plain folder name"),
    ("train.batch_size=1000000000", "memory: got a plan of "),
    ("model.n_embd=100000000", "memory: got a plan of "),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads are given up at once."""
    monkeypatch.setattr("gpu_microgpt.data.download.time.sleep", lambda seconds: None)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which the command ends, exit code 2."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    return only_line(capsys.readouterr().err)


def only_line(err: str) -> str:
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err  # splitlines also splits at U+2028 and its like
    return err


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    train(folder, "train.stop_at=5", "data.mode=stream", *QUIET)
    return folder / "runs" / "run"


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("mode", ["documents", "stream"])
def test_text(name: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, line = TEXTS[name]
    if (name, mode) == ("short", "documents"):
        line = "got 1 documents, too few to hold out"
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    err = refused(capsys, "train", settings_file(tmp_path, f"data.mode={mode}"))
    assert line in err
    assert name == "many" or str(path) in err
    assert path.read_bytes() == content
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("overrides", "line"), SETTINGS)
def test_setting(
    overrides: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is made, at whatever depth it is found."""
    file = settings_file(tmp_path, "train.sample_interval=0")
    assert line in refused(capsys, "train", file, *overrides.split(" "))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "got null, wanted sections of `key: value` settings"),
        (b"model: [", "not valid YAML: line 1"),
        (b"model: {n_layer: \xff}", "cannot read the settings: not UTF-8 text"),
        (b"model: 3\n", "model"),
        (b"seed: 1\nseed: 2\n", "not valid YAML: line 2: seed stands here again"),
        (b"model: {n_layer: 1}\n", "missing, wanted"),
    ],
)
def test_settings_file(
    content: bytes, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    err = refused(capsys, "train", str(path))
    assert line in err
    assert str(path) in err


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("", "holds a run at step 5: add resume=auto to go on with it, or run.name=OTHER"),
        ("resume=auto model.n_embd=16", "model.n_embd: got 16, but the checkpoint to resume has 8"),
        ("resume=auto data.source=EMPTY", "got an empty file"),
        ("resume=auto data.source=OTHER", "got characters outside the vocabulary: 'Z' (U+005A)"),
        ("resume=auto sample.prompt=Z", "got characters outside the vocabulary: 'Z' (U+005A)"),
        ("resume=auto train.batch_size=1000000000", "memory: got a plan of "),
        ("resume=auto dtype=tf32", "dtype: got tf32"),
        ("resume=no/such", "no folder no/such"),
    ],
)
def test_an_existing_run_is_untouched(
    overrides: str, line: str, template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = settings_file(tmp_path, "data.mode=stream", *QUIET)
    run = settings(tmp_path).run.path
    shutil.copytree(template, run)
    (tmp_path / "EMPTY").write_bytes(b"")
    (tmp_path / "OTHER").write_text("abcZ\n" * 50, encoding="utf-8")
    before = contents(run)
    given = [o.replace("source=", f"source={tmp_path}/") for o in overrides.split()]
    assert line in refused(capsys, "train", file, *given)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("RUN --prompt abZ€", "prompt: got characters outside the vocabulary: 'Z' (U+005A), "),
        ("RUN --prompt ab --prompt Z", "prompt: got characters outside the vocabulary: 'Z'"),
        ("RUN --prompt \u2028", "'\\u2028' (U+2028)"),
        ("RUN --prompt-file no/such", "no/such: cannot read the prompt: No such file"),
        ("RUN --max-tokens 0", "--max-tokens: got 0, wanted an integer >= 1"),
        ("RUN --temperature -1", "--temperature: got -1, wanted a number >= 0"),
        ("RUN --temperature inf", "temperature: got inf, wanted "),
        ("RUN --top-k -1", "--top-k: got -1, wanted an integer >= 0"),
        ("RUN --top-p 0", "top_p: got 0.0, wanted above 0, at most 1 (off)"),
        ("RUN --top-p nan", "--top-p: got nan, wanted a number from 0"),
        ("no/such", "no folder no/such"),
        (".", "no checkpoint in "),
        ("RUN/checkpoints/step-00000099", "no folder "),
        ("RUN/config.yaml", "no folder "),
    ],
)
def test_generate(
    arguments: str, line: str, template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [a.replace("RUN", str(template)) for a in arguments.split(" ")]
    before = contents(template)
    assert line in refused(capsys, "generate", *given)
    assert contents(template) == before


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_only_damaged_checkpoints(
    command: str, template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(template, run)
    for path in (run / "checkpoints").iterdir():
        truncate(path / "weights.safetensors")
    capsys.readouterr()
    assert cli.main([command, str(run)]) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: none of the ")
    assert warnings
    assert all(line.startswith("warning: skipped checkpoint ") for line in warnings)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("evaluate RUN --data no/such.txt", "got 'no/such.txt', no such file"),
        ("evaluate no/such", "no folder no/such"),
        ("prepare no/such.txt", "got 'no/such.txt', no such file"),
        ("plot no/such", "no/such"),
    ],
)
def test_other_commands(
    arguments: str, line: str, template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [a.replace("RUN", str(template)) for a in arguments.split()]
    assert line in refused(capsys, *given)


def test_known_file_with_the_wrong_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the user's own folder it is neither used nor touched."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / "names.txt").write_text("anna\nbob\n", encoding="utf-8")
    err = refused(capsys, "train", "names", f"run.dir={tmp_path / 'runs'}")
    assert f"{tmp_path / 'names.txt'}: wrong checksum: got 9 bytes" in err
    assert contents(tmp_path) == {"names.txt": b"anna\nbob\n"}


def test_cached_file_with_the_wrong_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the cache it is kept aside, and another one is asked for."""

    def unreachable(*args: object, **options: object) -> None:
        raise requests.ConnectionError

    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(requests, "get", unreachable)
    (tmp_path / "gpu_microgpt").mkdir()
    (tmp_path / "gpu_microgpt" / "names.txt").write_text("anna\n", encoding="utf-8")
    err = refused(capsys, "train", "microgpt", f"run.dir={tmp_path / 'runs'}")
    assert "cannot be reached" in err
    assert contents(tmp_path) == {"gpu_microgpt/names.txt.bad": b"anna\n"}


def test_a_file_where_the_run_should_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = settings_file(tmp_path)
    (tmp_path / "runs").write_text("mine", encoding="utf-8")
    assert str(tmp_path / "runs") in refused(capsys, "train", file)
    assert (tmp_path / "runs").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("train", "FILE data.source=EMPTY", "got an empty file"),
        ("train", "FILE model.n_layr=3", "did you mean model.n_layer?"),
        ("generate", "RUN --prompt Z", "outside the vocabulary: 'Z'"),
        ("evaluate", "RUN --data EMPTY", "got an empty file"),
    ],
)
def test_scripts(script: str, arguments: str, line: str, template: Path, tmp_path: Path) -> None:
    """The same through `python scripts/...`: no traceback reaches the user."""
    names = {
        "FILE": settings_file(tmp_path), "RUN": str(template), "EMPTY": str(tmp_path / "EMPTY")
    }  # fmt: skip
    (tmp_path / "EMPTY").write_bytes(b"")
    for name, path in names.items():
        arguments = arguments.replace(name, path)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments.split()],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert line in only_line(done.stderr)


def test_undecodable_command_line(template: Path) -> None:
    """A prompt typed in another encoding than the terminal's."""
    done = subprocess.run(
        [sys.executable.encode(), b"scripts/generate.py", str(template).encode(),
         b"--prompt", b"ab\xff"],
        cwd=ROOT, env=environment(), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "outside the vocabulary: '\\udcff'" in only_line(done.stderr.decode())
