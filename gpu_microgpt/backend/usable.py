"""Whether a GPU can compute here: what is missing, in one line, with what to do about it."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec

from ..errors import BackendError, ConfigError
from ..ops.cuda.compiler import compiler_release

OLDEST = 14  # CuPy: the first to know bfloat16
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
NO_DEVICE, OLD_DRIVER = 100, 35  # CUDA's numbers for them
INSTALL = "pip install 'gpu-microgpt[cuda13]', or [cuda12] with a driver older than 580"


class NoGpuError(BackendError):
    """No GPU computes here."""

    def __init__(self, why: str, remedy: str) -> None:
        """`why` in few words; `remedy`: what would change it."""
        super().__init__(f"{why}: {remedy}")
        self.why = why


def check_usable(device_id: int) -> None:
    """Raise NoGpuError, or another BackendError, unless CuPy, driver, GPU and compiler are there;
    ConfigError where there are GPUs, but not so many.

    CuPy is imported only where it and a driver are: a machine without a GPU loses no time to it.
    """
    if find_spec("cupy") is None:
        raise NoGpuError("CuPy is not installed", INSTALL)
    if not _loads(DRIVER):
        raise NoGpuError(
            "there is no NVIDIA driver",
            f"{DRIVER} cannot be loaded; install NVIDIA's driver, or use backend=numpy",
        )
    _check_cupy()
    _check_device(device_id, _count())
    compiler_release()  # raises where the compiler's library is missing


def _loads(library: str) -> bool:
    """Whether the system finds a shared library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _check_cupy() -> None:
    """It can be imported, and knows bfloat16."""
    try:
        import cupy
    except ImportError as failure:
        why = " ".join(str(failure).split())[:200]
        raise NoGpuError("CuPy cannot be imported", f"{why}: {INSTALL}") from None
    if int(cupy.__version__.partition(".")[0]) < OLDEST:
        raise NoGpuError(f"CuPy {cupy.__version__} is too old", f"wanted {OLDEST}.0; {INSTALL}")
    if find_spec("ml_dtypes") is None:  # CuPy itself does without
        raise NoGpuError("ml_dtypes is not installed", INSTALL)


def _count() -> int:
    """GPUs that CUDA sees."""
    from cupy.cuda import runtime

    try:
        return int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as failure:
        if failure.status == OLD_DRIVER:
            driver, built = runtime.driverGetVersion(), runtime.runtimeGetVersion()
            raise _wrong_wheel(driver, built) from None
        if failure.status == NO_DEVICE:
            return 0
        raise NoGpuError(
            f"CUDA does not start ({' '.join(str(failure).split())})",
            "see whether nvidia-smi works; a restart or a newer driver may help",
        ) from None


def _check_device(device_id: int, count: int) -> None:
    """There are so many GPUs: is it one of them?"""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    note = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
    if not count:
        raise NoGpuError(
            f"no NVIDIA GPU is seen{note}", "see whether nvidia-smi lists one, or use backend=numpy"
        )
    if device_id >= count:
        wanted = "0" if count == 1 else f"0 to {count - 1}"
        raise ConfigError(f"device: got {device_id}, wanted {wanted}, the GPUs that are seen{note}")


def _wrong_wheel(driver: int, built: int) -> NoGpuError:
    """CuPy was built for a newer CUDA (13020: 13.2) than the driver knows."""
    remedy = "install a newer NVIDIA driver"
    if driver // 1000 == 12 and built // 1000 > 12:
        remedy += (
            f", or pip uninstall cupy-cuda{built // 1000}x and pip install 'gpu-microgpt[cuda12]'"
        )
    return NoGpuError(
        f"the driver knows CUDA {release(driver)}, CuPy wants {release(built)}", remedy
    )


def release(version: int) -> str:
    """CUDA's number for a release in words: 13020 is 13.2."""
    return f"{version // 1000}.{version % 1000 // 10}"
