"""From kernel source to machine code, by NVRTC: needs CuPy and its compiler, but no GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ...errors import BackendError

HEADER = "device.cuh"  # the only file a kernel includes
OPTIONS = ("--std=c++17", "-ftz=true", "--ptxas-options=-v")
INSTALL = "pip install 'gpu-microgpt[cuda13]', or [cuda12] with an older driver"


@dataclass(frozen=True)
class Program:
    """All that decides the machine code, but for the compiler itself."""

    name: str  # of the file: relu.cu
    source: str
    header: str
    arch: str  # of a real GPU, sm_90, so that nothing is left for the driver to compile
    defines: tuple[str, ...]  # REAL_BF16=1

    @classmethod
    def read(cls, source: Path, arch: str, defines: Sequence[str] = ()) -> Program:
        """A kernel file and the header beside it.

        Raises BackendError where one of them cannot be read.
        """
        try:
            text, header = source.read_text("utf-8"), source.with_name(HEADER).read_text("utf-8")
        except OSError as failure:
            raise BackendError(f"{failure.filename}: cannot be read: {failure.strerror}") from None
        return cls(source.name, text, header, arch, tuple(defines))

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's."""
        return (*OPTIONS, f"-arch={self.arch}", *(f"-D{define}" for define in self.defines))

    def __str__(self) -> str:
        """The file, its constants and the architecture: what to say where it fails."""
        return " ".join([self.name, *self.defines, f"for {self.arch}"])


@dataclass(frozen=True)
class Compiled:
    """The kernels of one file as a GPU runs them, and what the compiler said of them."""

    cubin: bytes
    log: str


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers a thread, bytes of static shared memory a block.

    The other bytes a thread lie in memory and cost time: none are wanted.
    """

    registers: int
    static_shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def kernels_folder() -> Path:
    """Where the sources are: in a wheel, or in a clone. Raises BackendError where in neither."""
    package = Path(__file__).parents[2]
    wheel, clone = package / "_kernels", package.parent / "kernels"
    if wheel.is_dir():
        return wheel
    if clone.is_dir() and (package.parent / "pyproject.toml").is_file():
        return clone
    raise BackendError(f"no CUDA kernels: neither {wheel} nor {clone} exists; install anew")


def compile_kernel(source: Path, arch: str, defines: Sequence[str] = ()) -> Compiled:
    """Compile a kernel file; as `compile_program`, without a cache."""
    return compile_program(Program.read(source, arch, defines))


def compile_program(program: Program) -> Compiled:
    """Compile, holding no Python lock meanwhile: threads may do so side by side.

    Raises BackendError with the compiler's first error, and all it said as a note.
    """
    nvrtc = _nvrtc()
    known = nvrtc.getSupportedArchs()
    if int(program.arch.removeprefix("sm_")) not in known:
        raise BackendError(
            f"{program.arch}: NVRTC {compiler_release()} knows sm_{min(known)} to sm_{max(known)} "
            f"only: install another CUDA version ({INSTALL})"
        )
    header = program.header.encode()
    handle = nvrtc.createProgram(program.source, program.name, [header], [HEADER.encode()])
    try:
        nvrtc.compileProgram(handle, program.options)
        cubin = nvrtc.getCUBIN(handle) + b"\0"  # CuPy cuts the last byte, a zero, as if of a text
        return Compiled(cubin, _log(nvrtc, handle))
    except nvrtc.NVRTCError as failure:
        log = _log(nvrtc, handle)
        error = BackendError(f"{program} does not compile: {_first_error(log) or failure}")
        error.add_note(log)
        raise error from None
    finally:
        nvrtc.destroyProgram(handle)


def compiler_release() -> str:
    """NVRTC's version: its wheel's where there is one, 13.5.37, else what it tells, 13.5."""
    major, minor = _nvrtc().getVersion()
    for wheel in ("nvidia-cuda-nvrtc", f"nvidia-cuda-nvrtc-cu{major}"):
        with suppress(metadata.PackageNotFoundError):
            found = metadata.version(wheel)
            if found.startswith(f"{major}.{minor}."):
                return found
    return f"{major}.{minor}"


def resources(log: str) -> dict[str, Resources]:
    """What each kernel takes, read from the compiler's log. Raises ValueError where it is not as
    expected: nobody is to take a missing line for a zero."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        memory = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        registers = re.search(r"Used (\d+) registers", part)
        if memory is None or registers is None:
            raise ValueError(f"{name}: got a log without its resources: {part!r}")
        static = re.search(r"(\d+) bytes smem", part)
        sizes = (int(size) for size in memory.groups())
        found[name] = Resources(int(registers[1]), int(static[1]) if static else 0, *sizes)
    return found


def _nvrtc() -> Any:
    """CuPy's binding of the compiler."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()  # loads the library
    except ImportError as failure:
        raise BackendError(f"CuPy cannot be imported ({failure}): {INSTALL}") from None
    except RuntimeError as failure:
        why = str(failure).partition("\n")[0]
        raise BackendError(f"CUDA's compiler NVRTC cannot be loaded ({why}): {INSTALL}") from None
    return nvrtc


def _log(nvrtc: Any, handle: int) -> str:
    return str(nvrtc.getProgramLog(handle)).replace("\0", "").strip()


def _first_error(log: str) -> str:
    lines = (line.strip() for line in log.splitlines())
    return next((line for line in lines if re.search(r"\b(error|fatal) *:", line)), "")
