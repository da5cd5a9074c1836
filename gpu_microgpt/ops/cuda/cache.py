"""Compiled kernels on disk, so that a second start compiles nothing."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from ...errors import warn
from .compiler import Compiled, Program, compile_program, compiler_release

_SIZE, _DIGEST = 8, 32  # bytes of the trailer


class KernelCache:
    """A folder of machine code, a file for each program and compiler.

    Any number of processes may use it at once: files appear whole, under names that tell all that
    went into them. A file is a cubin with a trailer behind, so tools such as nvdisasm read it.
    """

    def __init__(
        self,
        folder: Path | None = None,
        compile: Callable[[Program], Compiled] = compile_program,
    ) -> None:
        """Use `folder`, or the user's cache; nothing is made yet."""
        self.folder = folder or kernels_cache()
        self._compile = compile
        self._warned = False

    def compiled(self, program: Program) -> Compiled:
        """The program's machine code, from the folder or else compiled and kept there.

        A damaged file is replaced. Where nothing can be kept, one warning is printed. Raises
        BackendError where the program does not compile.
        """
        path = self.folder / _name(program, compiler_release())
        found = _read(path)
        if found is None:
            found = self._compile(program)
            self._keep(path, found)
        return found

    def _keep(self, path: Path, compiled: Compiled) -> None:
        try:
            keep(path, _packed(compiled))
        except OSError as failure:
            if not self._warned:
                warn(
                    f"{self.folder}: compiled kernels cannot be kept ({failure.strerror}), so "
                    "every start compiles them anew"
                )
            self._warned = True


def kernels_cache() -> Path:
    """The user's folder for what is compiled and measured."""
    return platformdirs.user_cache_path("gpu_microgpt") / "kernels"


def keep(path: Path, content: bytes) -> None:
    """Write beside the place and rename, so that no half of a file is ever found.

    Raises OSError, and leaves nothing behind, where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(".partial", f".{path.stem}.", path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _name(program: Program, compiler: str) -> str:
    """A file name with a digest of all that decides the content."""
    content = (program.name, program.source, program.header, program.options, compiler)
    key = hashlib.sha256(repr(content).encode()).hexdigest()[:32]
    return f"{Path(program.name).stem}-{program.arch}-{key}.cubin"


def _packed(compiled: Compiled) -> bytes:
    """Cubin, log, the cubin's size, and a digest of the three."""
    body = compiled.cubin + compiled.log.encode() + len(compiled.cubin).to_bytes(_SIZE, "little")
    return body + hashlib.sha256(body).digest()


def _read(path: Path) -> Compiled | None:
    """What `_packed` wrote, or None where it is missing, unreadable or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        return None
    size = int.from_bytes(body[-_SIZE:], "little")
    return Compiled(body[:size], body[size:-_SIZE].decode())
