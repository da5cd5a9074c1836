"""How every function here is compiled: `@compiled`, and where the machine code is kept.

Sizes are run-time values, so that one compilation per dtype serves all models, and Numba keeps its
result on disk: in the user's cache folder, under a digest of the sources. The digest is needed
because functions of one file are compiled into those of another, with constants of the reference
operations, while Numba looks only at the file a function stands in.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import platformdirs
from filelock import FileLock
from numba import types
from numba.core.event import Listener, register

from ...errors import warn

OPTIONS: dict[str, Any] = {
    "nogil": True,  # shards of a batch run on threads side by side
    "error_model": "numpy",  # division by zero gives inf, and no branch
    "boundscheck": False,
    "fastmath": {"contract"},  # a * b + c in one rounding; NaN and inf stay visible
}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile `function` at its first call with new types, or load what an earlier run compiled."""
    folder = _usable_folder()
    _say_what_takes_so_long()
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = folder or before  # read once, while the function is decorated
    try:
        dispatcher = numba.njit(cache=bool(folder), **OPTIONS)(function)
    finally:
        numba.config.CACHE_DIR = before
    _take_constants_as_variables(dispatcher)
    if folder:
        _save_alone(dispatcher, Path(folder) / "lock")
    return dispatcher


def _save_alone(dispatcher: Any, lock: Path) -> None:
    """Two first runs at once would give code of two dtypes the same file name."""
    save = dispatcher._cache.save_overload

    def save_alone(*compiled_code: Any) -> None:
        with FileLock(lock):
            save(*compiled_code)

    dispatcher._cache.save_overload = save_alone


def _take_constants_as_variables(dispatcher: Any) -> None:
    """Numba would compile a callee anew for every constant that a caller gives it."""
    call_template = dispatcher.get_call_template

    def of_variables(arguments: Any, keywords: Any) -> Any:
        plain = {name: types.unliteral(kind) for name, kind in keywords.items()}
        return call_template(tuple(map(types.unliteral, arguments)), plain)

    dispatcher.get_call_template = of_variables


class _FirstCompilation(Listener):  # type: ignore[misc]
    """Says, once a process, that it takes a while; loading from disk is no such event."""

    said = False

    def on_start(self, event: Any) -> None:
        """Numba begins to compile."""
        if not _FirstCompilation.said:
            _FirstCompilation.said = True
            once = ", once on this machine" if _usable_folder() else ""
            print(f"compiling the CPU's kernels{once}: some 40 s", file=sys.stderr)

    def on_end(self, event: Any) -> None:
        """Nothing more is said."""


@cache
def _say_what_takes_so_long() -> None:
    register("numba:compile", _FirstCompilation())


def cache_folder() -> Path:
    """Where compiled code of these sources is kept."""
    return platformdirs.user_cache_path("gpu_microgpt") / "compiled" / _digest()


@cache
def _digest() -> str:
    """Of all sources in this folder, and of the reference operations'."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for folder in (here, here.parent / "reference"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _usable_folder() -> str:
    """The cache folder, made if need be; empty, and said once, where it cannot be written."""
    folder = cache_folder()
    if why := why_unwritable(folder):
        warn(f"cannot write {folder} ({why}): kernels are compiled anew at every start")
        return ""
    return str(folder)


def why_unwritable(folder: Path) -> str:
    """Make the folder if need be, and try to write there; empty: that works."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
