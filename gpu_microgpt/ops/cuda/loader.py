"""A GPU's kernels and properties, through CuPy."""

from __future__ import annotations

from typing import Any

from ...errors import BackendError
from .cache import KernelCache
from .compiler import INSTALL, Program, kernels_folder
from .context import Grid, Kernel
from .device import Device
from .failures import DEAD, MEMORY, device_error

OLDEST = (7, 5)  # compute capability the kernels are made for
FREE_SHARED = 48 << 10  # bytes a block may take, static and dynamic, without asking


class LoadedKernel:
    """A kernel on the GPU, whose failures are told in one line."""

    def __init__(self, name: str, function: Any) -> None:
        """`function`: CuPy's."""
        self.name, self.function = name, function

    def __call__(
        self, grid: Grid, block: Grid, args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        """Launch, as `context.Kernel` has it. Raises DeviceError where CUDA refuses."""
        try:
            self.function(grid, block, args, shared_mem)
        except RuntimeError as failure:
            raise device_error(failure, f"launching {self.name}") or failure from None


class CudaLoader:
    """Gives launchers their kernels for the GPU in use: compiled once, loaded once."""

    def __init__(self, device: Device, cache: KernelCache | None = None) -> None:
        """`device`: properties of CuPy's current device."""
        self.device, self._cache = device, cache or KernelCache()
        self._folder = kernels_folder()
        self._modules: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._allowed: dict[tuple[str, str, tuple[str, ...]], int] = {}

    def function(
        self, stem: str, name: str, defines: tuple[str, ...], shared_mem: int = 0
    ) -> Kernel:
        """Kernel `name` of `kernels/stem.cu`, as `context.Loader` has it.

        Raises BackendError where it does not compile, is not there, or the GPU cannot run it;
        DeviceError where the GPU is lost or full.
        """
        try:
            function = self._module(stem, defines).get_function(name)
            self._allow((stem, name, defines), function, shared_mem)
        except RuntimeError as failure:  # the driver's
            if getattr(failure, "status", None) in (MEMORY, *DEAD):
                raise device_error(failure, f"loading {name}") or failure from None
            raise BackendError(
                f"{stem}.cu: the driver refuses kernel {name} with {shared_mem:,} bytes of shared "
                f"memory on {self.device.name} ({self.device.arch}): {failure}"
            ) from None
        return LoadedKernel(name, function)

    def _module(self, stem: str, defines: tuple[str, ...]) -> Any:
        """The file's kernels on the GPU."""
        if (stem, defines) not in self._modules:
            from cupy.cuda.function import Module

            source = Program.read(self._folder / f"{stem}.cu", self.device.arch, defines)
            module = Module()
            module.load(self._cache.compiled(source).cubin)
            self._modules[stem, defines] = module
        return self._modules[stem, defines]

    def _allow(self, key: tuple[str, str, tuple[str, ...]], function: Any, wanted: int) -> None:
        """Let a kernel take so much dynamic shared memory. It stands for all who ask for the same
        kernel, so the limit is only ever raised."""
        from cupy.cuda import driver

        if wanted <= self._allowed.get(key, 0):
            return
        static = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function.ptr)
        if static + wanted > FREE_SHARED:
            attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(function.ptr, attribute, wanted)
        self._allowed[key] = wanted


def device_properties(device_id: int = 0) -> Device:
    """What launchers must know of a GPU of this machine.

    Raises BackendError where there is none, or it is older than the kernels are made for.
    """
    try:
        from cupy.cuda import runtime

        found = runtime.getDeviceProperties(device_id)
        kilohertz = runtime.deviceGetAttribute(runtime.cudaDevAttrClockRate, device_id)
    except ImportError as failure:
        raise BackendError(f"CuPy cannot be imported ({failure}): {INSTALL}") from None
    except RuntimeError as failure:
        raise BackendError(f"GPU {device_id} cannot be used: {failure}") from None
    device = Device(
        name=found["name"].decode(),
        capability=(found["major"], found["minor"]),
        multiprocessors=found["multiProcessorCount"],
        shared_per_block=found["sharedMemPerBlockOptin"],
        shared_per_multiprocessor=found["sharedMemPerMultiprocessor"],
        threads_per_multiprocessor=found["maxThreadsPerMultiProcessor"],
        blocks_per_multiprocessor=found["maxBlocksPerMultiProcessor"],
        l2_bytes=found["l2CacheSize"],
        registers_per_multiprocessor=found["regsPerMultiprocessor"],
        reserved_shared=found["reservedSharedMemPerBlock"],
        clock_hz=kilohertz * 1000,
    )
    if device.capability < OLDEST:
        raise BackendError(f"{device.name}: got {device.arch}, wanted sm_75 (Turing) or newer")
    return device
