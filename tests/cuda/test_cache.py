"""Compiled kernels on disk: a second start compiles nothing, and no damage is ever loaded."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_microgpt.ops.cuda import cache
from gpu_microgpt.ops.cuda.cache import KernelCache
from gpu_microgpt.ops.cuda.compiler import Compiled, Program

RELU = Program("relu.cu", "source", "header", "sm_90", ("REAL_BF16=1",))
ROOT = Path(__file__).parents[2]


class Compiler:
    """Counts what it is asked for; every answer is another."""

    def __init__(self) -> None:
        self.calls: list[Program] = []

    def __call__(self, program: Program) -> Compiled:
        self.calls.append(program)
        return Compiled(b"\x7fELF" + bytes(range(256)) * 40, f"log {len(self.calls)} \u2713")


@pytest.fixture(autouse=True)
def release(monkeypatch):
    monkeypatch.setattr(cache, "compiler_release", lambda: "13.5.37")


@pytest.fixture
def compiler():
    return Compiler()


def test_a_second_start_compiles_nothing(tmp_path, compiler):
    first = KernelCache(tmp_path / "made" / "here", compiler).compiled(RELU)
    again = KernelCache(tmp_path / "made" / "here", compiler).compiled(RELU)
    assert again == first
    assert compiler.calls == [RELU]
    [path] = (tmp_path / "made" / "here").iterdir()
    assert path.name.startswith("relu-sm_90-")
    assert path.read_bytes().startswith(first.cubin)  # as tools expect it


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Program)])
def test_whatever_changes_is_compiled(tmp_path, compiler, field):
    other = {"arch": "sm_80", "defines": ("REAL_BF16=0",)}.get(field, "other")
    kernels = KernelCache(tmp_path, compiler)
    one = kernels.compiled(RELU)
    two = kernels.compiled(dataclasses.replace(RELU, **{field: other}))
    assert len(compiler.calls) == 2
    assert kernels.compiled(RELU) == one != two


def test_another_compiler_compiles(tmp_path, compiler, monkeypatch):
    KernelCache(tmp_path, compiler).compiled(RELU)
    monkeypatch.setattr(cache, "compiler_release", lambda: "13.6.1")
    KernelCache(tmp_path, compiler).compiled(RELU)
    assert len(compiler.calls) == 2


def test_other_options_compile(tmp_path, compiler, monkeypatch):
    KernelCache(tmp_path, compiler).compiled(RELU)
    monkeypatch.setattr("gpu_microgpt.ops.cuda.compiler.OPTIONS", ("--std=c++20",))
    KernelCache(tmp_path, compiler).compiled(RELU)
    assert len(compiler.calls) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:100] + b"?" + content[101:],
        lambda content: content[:-40] + bytes(8) + content[-32:],
    ],
    ids=["empty", "short", "cut", "longer", "bit", "size"],
)
def test_a_damaged_file_is_replaced(tmp_path, compiler, damage):
    kernels = KernelCache(tmp_path, compiler)
    first = kernels.compiled(RELU)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    second = kernels.compiled(RELU)
    assert second.cubin == first.cubin
    assert second.log != first.log
    assert KernelCache(tmp_path, compiler).compiled(RELU) == second
    assert len(compiler.calls) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_folder_costs_one_warning(tmp_path, compiler, capsys):
    (tmp_path / "file").touch()
    kernels = KernelCache(tmp_path / "file" / "kernels", compiler)
    assert kernels.compiled(RELU).log.startswith("log 1")
    assert kernels.compiled(RELU).log.startswith("log 2")
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [
        f"warning: {kernels.folder}: compiled kernels cannot be kept (Not a directory), so every "
        "start compiles them anew"
    ]


def test_a_full_disk_leaves_nothing_behind(tmp_path, compiler, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert KernelCache(tmp_path, compiler).compiled(RELU).log.startswith("log 1")
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_users_cache_is_the_place(tmp_path, compiler, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / name)
    assert KernelCache(compile=compiler).folder == tmp_path / "gpu_microgpt" / "kernels"
    assert not list(tmp_path.iterdir())


SWARM = """
import random, sys
from contextlib import suppress
from pathlib import Path
from gpu_microgpt.ops.cuda import cache
from gpu_microgpt.ops.cuda.compiler import Compiled, Program

cache.compiler_release = lambda: "1"
folder, chance = Path(sys.argv[1]), random.Random(sys.argv[2])
calls = []

def answer(program):
    calls.append(program)
    return Compiled(program.source.encode() * 9999, program.name)

for _ in range(300):
    program = Program("a.cu", f"text {chance.randrange(4)}", "", "sm_90", ())
    kernels = cache.KernelCache(folder, answer)
    found, wanted = kernels.compiled(program), answer(program)
    assert found == wanted
    if chance.random() < 0.1:
        for path in folder.glob("*.cubin"):
            with suppress(FileNotFoundError):
                path.unlink() if chance.random() < 0.5 else path.write_bytes(b"half")
print(len(calls) - 300)
"""


def test_two_processes_at_once(tmp_path):
    """They write, read, delete and damage the same few files."""
    command = [sys.executable, "-c", SWARM, str(tmp_path)]
    runs = [
        subprocess.Popen([*command, seed], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for seed in "ab"
    ]
    compiled = [int(run.communicate(timeout=60)[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert 4 <= sum(compiled) < 400, compiled  # of 600
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".cubin"]
