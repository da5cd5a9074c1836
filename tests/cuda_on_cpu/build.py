"""Compile a kernel file for the CPU: the same source, g++ in place of NVRTC."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.cuda_on_cpu.compiler import COMPILER, require_compiler, supported
from tests.cuda_on_cpu.launch import EmulatedKernel, KernelError
from tests.cuda_on_cpu.sanitize import SANITIZER

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"
CACHE = Path(  # of what was compiled, from one process to the next
    os.environ.get("CUDA_ON_CPU_CACHE", Path(tempfile.gettempdir()) / f"cuda_on_cpu-{os.getuid()}")
)
FLAGS = [
    "-std=c++17", "-O2", "-g1", *(["-mavx2", "-mfma"] if platform.machine() == "x86_64" else []),
    "-ftls-model=global-dynamic", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden",
    "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function",
]  # fmt: skip
SANITIZE = {
    "": ["-fsanitize=undefined,float-cast-overflow", "-fsanitize-undefined-trap-on-error"],
    "address": ["-O1", "-fsanitize=address", "-fsanitize-recover=address"],
    "thread": ["-O1", "-fsanitize=thread", "-Wno-tsan"],
}
UNSET_LOCALS = "-ftrivial-auto-var-init=pattern"  # locals nobody set hold huge numbers
_GLOBAL = re.compile(
    r"__global__\s+(?:void\s+)?(?:__launch_bounds__\s*\([^)]*\)\s*)?(?:void\s+)?(\w+)\s*\("
)


class CompileError(KernelError):
    """The compiler's words."""


class EmulatedModule:
    """A kernel file compiled with some -D constants."""

    def __init__(self, source: Path, defines: tuple[str, ...] = ()) -> None:
        """Compile `source`, or load what an earlier process compiled from the same text.

        Raises CompileError; skips the test that needs it where there is no compiler.
        """
        require_compiler()
        source = source.resolve()
        folders = dict.fromkeys((source.parent, KERNELS, HERE))  # where an include is looked for
        headers = [p for f in folders for p in sorted((*f.glob("*.h"), *f.glob("*.cuh")))]
        text = source.read_text("utf-8")
        flags = [*FLAGS, *SANITIZE[SANITIZER], *(f"-D{d}" for d in defines)]
        flags += [UNSET_LOCALS] if supported(UNSET_LOCALS) else []
        parts = [COMPILER, flags, text, *(h.read_text("utf-8") for h in headers)]
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        library = cache_folder() / f"{source.stem}-{key}.so"
        if not library.exists():
            _compile(source, flags + [f"-I{f}" for f in folders], library)
        self._library = ctypes.PyDLL(str(library))  # keeps the lock: one launch at a time

    def get_function(self, name: str) -> EmulatedKernel:
        """The kernel of this name, as of `cupy.RawModule`."""
        return EmulatedKernel(self._library, name)


@cache
def module(source: Path, defines: tuple[str, ...] = ()) -> EmulatedModule:
    """An EmulatedModule, made once a process."""
    return EmulatedModule(source, defines)


def cache_folder() -> Path:
    """CACHE, made. Raises PermissionError where it is someone else's, who could change what is in
    it."""
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    if CACHE.stat().st_uid != os.getuid():
        raise PermissionError(f"{CACHE}: belongs to another user; set CUDA_ON_CPU_CACHE")
    return CACHE


def _compile(source: Path, flags: list[str], library: Path) -> None:
    """Processes that do this at the same time each make the same file; the last one's stays."""
    names = sorted(set(_GLOBAL.findall(source.read_text("utf-8"))))
    exports = "".join(f"EMU_EXPORT({name})\n" for name in names)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        stub, made = Path(folder, f"{source.stem}.cpp"), Path(folder, library.name)
        stub.write_text(f'#include "{source}"\n{exports}', "utf-8")
        command = [COMPILER, *flags, str(stub), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{source.name}: {done.stderr}")
        os.replace(made, library)
