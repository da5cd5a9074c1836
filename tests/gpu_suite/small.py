"""Every kernel once, at small sizes, for a memory checker: python -m tests.gpu_suite.small

Prints a line for each file of kernels. --emulated: on the CPU. Further arguments: which.
"""

from __future__ import annotations

import sys

from tests.cuda.machine import Gpu, Machine
from tests.cuda.sanitized import small, stems
from tests.cuda_on_cpu.loader import EmulatedLoader


def machine(emulated: bool) -> Machine:
    """On a GPU each array is an allocation of its own, so that nothing lies behind it."""
    if emulated:
        return Machine(EmulatedLoader("lifo"))
    import cupy

    cupy.cuda.set_allocator(None)
    return Gpu()


if __name__ == "__main__":
    chosen = machine("--emulated" in sys.argv)
    for stem in [name for name in sys.argv[1:] if name[0] != "-"] or stems():
        small(stem)(chosen)
        print(f"{stem}: done", flush=True)
