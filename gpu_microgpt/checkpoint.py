"""Checkpoints: written atomically, verified when read, rotated.

A checkpoint is a folder `step-00000100` holding
    weights.safetensors     NAME -> array
    optimizer.safetensors   m.NAME and v.NAME -> array: Adam's moments, shaped like the weight NAME
    state.json              format version, step, meta; size and SHA-256 of both files and of itself
The checksums tell accidents, not forgeries. atomic_folder.py says why a crash leaves no half one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as decode_arrays
from safetensors.numpy import save as encode_arrays

from . import atomic_folder
from .errors import CheckpointError

FORMAT_VERSION = 1
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class State:
    """All that a run needs to go on, on the host. Loaded arrays may be read-only."""

    step: int  # optimiser steps done
    weights: dict[str, np.ndarray]  # NAME -> array of any shape
    moments: dict[str, np.ndarray]  # m.NAME and v.NAME -> shape of NAME; {} if not loaded
    meta: dict[str, Any]  # JSON values (tuples come back as lists); "val_loss" ranks checkpoints


class _DamagedError(Exception):
    """Why a checkpoint cannot be used; who catches it says which one and what to do."""


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def save(folder: Path, state: State, keep: int) -> Path:
    """Write `state` as a checkpoint in `folder`; it is durable when its path is returned.

    An earlier checkpoint of the same step is replaced. Only then, of the checkpoints up to this
    step, all but the last `keep` and the best (lowest meta["val_loss"]) are deleted. Later steps
    (see `discard_after`) and checkpoints that cannot be read are neither counted nor deleted.

    Raises CheckpointError if the disk is full or refuses, or if the moments do not fit the weights;
    the checkpoints that were there stay untouched.
    """
    if keep < 1:
        raise CheckpointError(f"checkpoint.keep is {keep}: at least 1 checkpoint has to be kept")
    path = folder / checkpoint_name(state.step)
    try:
        _check_shapes(state.weights, state.moments)
    except _DamagedError as error:
        raise CheckpointError(f"cannot save {path}: {error}") from error
    files = _encode(state)
    with _one_line(f"cannot save {path}", folder, sum(map(len, files.values()))):
        atomic_folder.publish(path, files)
    with _one_line(f"saved {path} but cannot delete an older one", folder):
        _rotate(folder, state.step, keep)
    return path


def discard_after(folder: Path, step: int) -> list[Path]:
    """Delete the good checkpoints later than `step` and return their paths, the latest first.

    For a run that goes on from an older checkpoint: the later ones are no longer its future, and
    would otherwise be found as the newest. Raises CheckpointError if the disk refuses.
    """
    later = []
    for saved, path in _checkpoints(folder):
        if saved > step:
            with suppress(_DamagedError):  # nothing is deleted that cannot be judged
                _read_state(path)
                later.append(path)
    with _one_line(f"cannot delete the checkpoints after step {step}", folder):
        for path in later:
            atomic_folder.remove(path)
        if later:
            atomic_folder.fsync_folder(folder)
    return later


def _encode(state: State) -> dict[str, bytes]:
    """File name -> content."""
    files = {}
    for name, arrays in ((WEIGHTS, state.weights), (OPTIMIZER, state.moments)):
        # safetensors writes memory as it lies and ignores strides
        files[name] = encode_arrays({key: np.asarray(a, order="C") for key, a in arrays.items()})
    records = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}
    payload = {"step": state.step, "files": records, "meta": state.meta}
    document = {
        "format_version": FORMAT_VERSION,
        "sha256": _payload_sha256(payload),
        "payload": payload,
    }
    files[STATE] = json.dumps(document, indent=1).encode()
    return files


def _rotate(folder: Path, step: int, keep: int) -> None:
    ranked = []  # (val_loss, path), newest first
    for saved, path in _checkpoints(folder):
        if saved <= step:
            with suppress(_DamagedError):  # nothing is deleted that cannot be judged
                ranked.append((_val_loss(_read_state(path)), path))
    best_path = min(ranked, key=lambda entry: entry[0])[1]
    for _, path in ranked[keep:]:
        if path != best_path:
            atomic_folder.remove(path)


@contextmanager
def _one_line(problem: str, folder: Path, wanted: int = 0) -> Iterator[None]:
    """Turn an OSError into one clear line; `wanted` is the number of bytes to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f"{wanted:,} bytes are wanted; free some space or set run.dir to another disk"
        else:
            advice = "check the disk and the folder's permissions or set run.dir to another folder"
        where = f"{error.strerror or error} at {error.filename or folder}"
        message = f"{problem}: {where}; {advice}; earlier checkpoints are kept"
        raise CheckpointError(message) from error


def load(path: Path, *, with_moments: bool = True) -> State:
    """Read one checkpoint folder, verified: sizes, checksums, format, names and shapes.

    Without moments the optimiser's file is neither read nor needed.
    Raises CheckpointError, one line saying what is wrong with which file.
    """
    if not path.is_dir():
        raise CheckpointError(f"no folder {path}: a run's folder or a checkpoint in it is wanted")
    try:
        return _load(path, with_moments)
    except _DamagedError as error:
        advice = "give the run's folder instead to use its best good checkpoint"
        raise CheckpointError(f"cannot use checkpoint {path}: {error}; {advice}") from error


def newest(folder: Path, warn: Callable[[str], None], *, with_moments: bool = True) -> State:
    """Load the newest good checkpoint; `warn` gets one line for each bad one passed over.

    Raises CheckpointError if there is none.
    """
    return _first_good(folder, [path for _, path in _checkpoints(folder)], warn, with_moments)


def best(folder: Path, warn: Callable[[str], None], *, with_moments: bool = True) -> State:
    """Load the good checkpoint of the lowest meta["val_loss"], else the newest good one.

    Those without a finite val_loss come last, and the newest first among equals. `warn` gets one
    line for each bad one met. Raises CheckpointError if there is no good one.
    """
    ranked = []
    for _, path in _checkpoints(folder):
        try:
            loss = _val_loss(_read_state(path, (WEIGHTS,)))
        except _DamagedError:
            loss = math.inf  # tried last, and reported then
        ranked.append((loss, path))
    ranked.sort(key=lambda entry: entry[0])
    return _first_good(folder, [path for _, path in ranked], warn, with_moments)


def find(
    path: Path,
    which: Literal["best", "last"] = "best",
    *,
    warn: Callable[[str], None],
    with_moments: bool = True,
) -> State:
    """Load from a checkpoint's folder, a `checkpoints` folder or a run's folder.

    `which` chooses where there are several. Raises CheckpointError if there is no good one.
    """
    if (path / STATE).exists() or _NAME.fullmatch(path.name) or not path.is_dir():
        return load(path, with_moments=with_moments)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    choose = best if which == "best" else newest
    return choose(folder, warn, with_moments=with_moments)


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, good or bad, newest first; [] if there is no folder."""
    return [step for step, _ in _checkpoints(folder)]


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path), newest first."""
    found = atomic_folder.published(folder).items()
    matches = [(match, path) for name, path in found if (match := _NAME.fullmatch(name))]
    return sorted(((int(match[1]), path) for match, path in matches), reverse=True)


def _first_good(
    folder: Path, paths: list[Path], warn: Callable[[str], None], with_moments: bool
) -> State:
    for path in paths:
        try:
            return _load(path, with_moments)
        except _DamagedError as error:
            warn(f"skipped checkpoint {path}: {error}")
    if paths:
        count = f"none of the {len(paths)} checkpoints in {folder} can be used"
        raise CheckpointError(f"{count}, as the warnings say; train again or restore a copy")
    raise CheckpointError(f"no checkpoint in {folder}: folders step-NNNNNNNN are wanted")


def _load(path: Path, with_moments: bool) -> State:
    payload = _read_state(path, (WEIGHTS, OPTIMIZER) if with_moments else (WEIGHTS,))
    weights = _read_arrays(path / WEIGHTS, payload)
    moments = {}
    if with_moments:
        moments = _read_arrays(path / OPTIMIZER, payload)
        _check_shapes(weights, moments)
    return State(payload["step"], weights, moments, payload["meta"])


def _read_state(path: Path, files: tuple[str, ...] = (WEIGHTS, OPTIMIZER)) -> dict[str, Any]:
    """The verified payload of state.json; checks the sizes, not the checksums, of `files`."""
    try:
        document = json.loads(_read(path / STATE))
        version = document["format_version"]
        if version != FORMAT_VERSION:
            wanted = f"this program reads {FORMAT_VERSION}"
            raise _DamagedError(f"{STATE} has format version {version!r}, {wanted}")
        payload: dict[str, Any] = document["payload"]
        if _payload_sha256(payload) != document["sha256"]:
            raise _DamagedError(f"{STATE} was altered: its checksum differs from the one in it")
        sizes = {name: payload["files"][name]["bytes"] for name in files}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise _DamagedError(f"{STATE} is not a checkpoint's JSON ({reason})") from error
    for name, size in sizes.items():
        try:
            got = (path / name).stat().st_size
        except OSError as error:
            raise _DamagedError(f"{name} cannot be read ({error.strerror})") from error
        if got != size:
            raise _DamagedError(f"{name} has {got:,} bytes, {size:,} were written")
    return payload


def _read_arrays(path: Path, payload: dict[str, Any]) -> dict[str, np.ndarray]:
    data = _read(path)
    if _sha256(data) != payload["files"][path.name]["sha256"]:
        raise _DamagedError(f"{path.name} was altered: its checksum differs from {STATE}'s")
    try:
        return decode_arrays(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise _DamagedError(f"{path.name} is not safetensors ({error})") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _DamagedError(f"{path.name} cannot be read ({error.strerror})") from error


def _check_shapes(weights: dict[str, np.ndarray], moments: dict[str, np.ndarray]) -> None:
    wanted = {f"{kind}.{name}": a.shape for kind in "mv" for name, a in weights.items()}
    got = {name: a.shape for name, a in moments.items()}
    for name in sorted(wanted.keys() | got.keys()):
        if got.get(name) != wanted.get(name):
            shapes = f"has shape {got.get(name)}, its weight wants {wanted.get(name)}"
            raise _DamagedError(f"moment {name} {shapes}")


def _val_loss(payload: dict[str, Any]) -> float:
    """Infinity where the held-out loss was not measured or is not a number."""
    loss = payload["meta"].get("val_loss")
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else math.inf


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _payload_sha256(payload: dict[str, Any]) -> str:
    return _sha256(json.dumps(payload, separators=(",", ":")).encode())
