"""The stand-in for a GPU: kernels on the CPU, in a schedule of one's choice."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tests.cuda_on_cpu.build import KERNELS, SANITIZER, module


class EmulatedLoader:
    """Gives launchers their kernels, as `gpu_microgpt.ops.cuda`'s loader does on a GPU."""

    def __init__(
        self, order: str = "fifo", seed: int = 0, resident: bool = False, folder: Path = KERNELS
    ) -> None:
        """Run threads in this order; `resident`: all blocks of a launch at once.

        Under lifo what is read in front of an array faults, otherwise what is read behind it.
        """
        guard = {"address": "heap", "thread": ""}.get(
            SANITIZER, "before" if order == "lifo" else "after"
        )
        self._how = {"order": order, "seed": seed, "resident": resident, "guard": guard}
        self._folder = folder
        self.launched: list[str] = []  # names of kernels, as they were asked for

    def function(self, stem: str, name: str, defines: tuple[str, ...], shared_mem: int = 0) -> Any:
        """Kernel `name` of `kernels/stem.cu`, ready to be called (grid, block, args)."""
        self.launched.append(name)
        kernel = module(self._folder / f"{stem}.cu", defines).get_function(name)
        return partial(kernel, **self._how)
