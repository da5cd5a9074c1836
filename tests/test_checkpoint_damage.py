"""Every kind of damage is named in one clear line, and the next good checkpoint is used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as decode_arrays
from safetensors.numpy import save as encode_arrays

from gpu_microgpt import checkpoint
from gpu_microgpt.checkpoint import OPTIMIZER, STATE, WEIGHTS
from gpu_microgpt.errors import CheckpointError
from tests.checkpoint_helpers import assert_same, make_state, one_line, truncate


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def rewrite_state(path: Path, change: Callable[[dict[str, Any]], None], *, sign: bool) -> None:
    """Alter state.json; with `sign` its own checksum is made right again."""
    document = json.loads((path / STATE).read_text())
    change(document)
    if sign:
        text = json.dumps(document["payload"], separators=(",", ":"))
        document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / STATE).write_text(json.dumps(document))


def rewrite_arrays(path: Path, name: str, data: bytes) -> None:
    """Replace an array file and make every checksum agree with it."""
    (path / name).write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite_state(path, lambda d: d["payload"]["files"].update({name: record}), sign=True)


def rewrite_tensors(path: Path, name: str, changes: dict[str, np.ndarray | None]) -> None:
    arrays = decode_arrays((path / name).read_bytes()) | changes
    kept = {key: array for key, array in arrays.items() if array is not None}
    rewrite_arrays(path, name, encode_arrays(kept))


def change_rate(document: dict[str, Any]) -> None:
    document["payload"]["meta"]["config"]["lr"] = 0.3


Damage = Callable[[Path], object]
FILES = (STATE, WEIGHTS, OPTIMIZER)
FILE_DAMAGES: tuple[tuple[Damage, str], ...] = (
    (truncate, r"has [\d,]+ bytes, [\d,]+ were written|is not a checkpoint's JSON"),
    (empty, r"has 0 bytes, [\d,]+ were written|is not a checkpoint's JSON"),
    (lambda file: flip_bit(file, -1), r"was altered|is not a checkpoint's JSON"),
    (Path.unlink, r"cannot be read \(No such file"),
    (replace_by_folder, r"cannot be read \(Is a directory|has [\d,]+ bytes"),
)
DAMAGES: dict[str, tuple[Damage, str]] = {
    "value altered": (
        lambda path: rewrite_state(path, change_rate, sign=False),
        r"state\.json was altered",
    ),
    "key missing": (
        lambda path: rewrite_state(path, lambda d: d["payload"].pop("files"), sign=True),
        r"state\.json is not a checkpoint's JSON \(KeyError: 'files'\)",
    ),
    "future format": (
        lambda path: rewrite_state(path, lambda d: d.update(format_version=2), sign=False),
        r"state\.json has format version 2, this program reads 1",
    ),
    "not UTF-8": (lambda path: flip_bit(path / STATE, 40, 7), r"state\.json is not .*utf-8"),
    "no object": (lambda path: (path / STATE).write_text("[1]"), r"state\.json is not"),
    "too deep": (lambda path: (path / STATE).write_text("[" * 200_000), r"state\.json is not"),
    "wrong shape": (
        lambda path: rewrite_tensors(path, OPTIMIZER, {"v.wte": np.zeros((4, 5))}),
        r"moment v\.wte has shape \(4, 5\), its weight wants \(5, 4\)",
    ),
    "moment missing": (
        lambda path: rewrite_tensors(path, OPTIMIZER, {"m.wte": None}),
        r"moment m\.wte has shape None, its weight wants \(5, 4\)",
    ),
    "weight missing": (
        lambda path: rewrite_tensors(path, WEIGHTS, {"wte": None}),
        r"moment m\.wte has shape \(5, 4\), its weight wants None",
    ),
    "not safetensors": (
        lambda path: rewrite_arrays(path, WEIGHTS, b"not safetensors"),
        r"weights\.safetensors is not safetensors",
    ),
}


def check_damage(folder: Path, damage: Damage, reason: str) -> None:
    """One clear line from load; newest and best pass over it and say so."""
    for step in (1, 2, 3):
        checkpoint.save(folder, make_state(step), keep=3)
    bad = folder / "step-00000003"
    damage(bad)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(bad))}: ({reason})") as error:
        checkpoint.load(bad)
    one_line(error)
    warnings: list[str] = []
    assert_same(checkpoint.newest(folder, warnings.append), make_state(2))
    assert len(warnings) == 1
    assert "\n" not in warnings[0]
    assert re.search(f"{re.escape(str(bad))}: ({reason})", warnings[0])
    assert checkpoint.best(folder, warnings.append).step == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("damage", "reason"), FILE_DAMAGES)
def test_damaged_file(tmp_path: Path, name: str, damage: Damage, reason: str) -> None:
    check_damage(tmp_path, lambda path: damage(path / name), f"{re.escape(name)} ({reason})")


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_content(tmp_path: Path, kind: str) -> None:
    check_damage(tmp_path, *DAMAGES[kind])


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    state = make_state(7, 1.5)
    path = checkpoint.save(tmp_path, state, keep=1)
    harmless = set()
    for name in FILES:
        good = (path / name).read_bytes()
        for position in range(len(good)):
            flip_bit(path / name, position, position * 5 % 8)
            with contextlib.suppress(CheckpointError):
                assert_same(checkpoint.load(path), state)
                harmless.add(name)
        (path / name).write_bytes(good)
    assert harmless <= {STATE}  # JSON can say one thing in two ways: \u20ac, \u20AC


def test_several_bad_ones_in_a_row_are_all_named(tmp_path: Path) -> None:
    for step in range(1, 5):
        checkpoint.save(tmp_path, make_state(step), keep=9)
    for step in (4, 3, 2):
        truncate(tmp_path / checkpoint.checkpoint_name(step) / OPTIMIZER)
    warnings: list[str] = []
    assert_same(checkpoint.newest(tmp_path, warnings.append), make_state(1))
    assert [line.partition(":")[0][-13:] for line in warnings] == [
        "step-00000004",
        "step-00000003",
        "step-00000002",
    ]
    truncate(tmp_path / "step-00000001" / WEIGHTS)
    with pytest.raises(CheckpointError, match="none of the 4 checkpoints") as error:
        checkpoint.newest(tmp_path, warnings.append)
    one_line(error)


def test_best_skips_damage_with_one_warning_each(tmp_path: Path) -> None:
    for step, loss in enumerate([2.0, 1.0, 0.5, 3.0], start=1):
        checkpoint.save(tmp_path, make_state(step, loss), keep=9)
    flip_bit(tmp_path / "step-00000003" / WEIGHTS, -1)
    (tmp_path / "step-00000002" / STATE).unlink()
    (tmp_path / "step-00000004" / STATE).unlink()
    warnings: list[str] = []
    assert checkpoint.best(tmp_path, warnings.append).step == 1
    assert len(warnings) == 1
    assert "step-00000003" in warnings[0]
    shutil.rmtree(tmp_path / "step-00000001")
    warnings.clear()
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        checkpoint.best(tmp_path, warnings.append)
    assert len(warnings) == 3
