"""Every kernel under a sanitizer: python -m tests.cuda.sanitized address|thread [stem ...]

Runs what the tests of kernels (of the stems named, or of all) export as `small`, in a process with
the environment that tests.cuda_on_cpu.sanitize makes. Prints a line for each; of all, also one for
the mistakes of mistakes.cu. Exits with 1 if one is not clean.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np

from tests.cuda.machine import Machine
from tests.cuda_on_cpu.build import HERE, KERNELS, SANITIZER
from tests.cuda_on_cpu.launch import KernelError
from tests.cuda_on_cpu.loader import EmulatedLoader

Small = Callable[[Machine], None]

# Blocks after one another show races on static shared memory; side by side, races between blocks.
# In this order, as what is at one address for several resident blocks is no longer watched after.
SCHEDULES = {
    "address": [("fifo", 0, False)],
    "thread": [("random", 0, False), ("random", 0, True)],
}


def stems() -> list[str]:
    """Of tests/cuda/test_<stem>.py that export `small`."""
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    return [f.stem.removeprefix("test_") for f in files if "\ndef small(" in f.read_text("utf-8")]


def small(stem: str) -> Small:
    """What the tests of this stem export."""
    function: Small = import_module(f"tests.cuda.test_{stem}").small
    return function


def failures(stem: str, folder: Path) -> Iterator[str]:
    """What the sanitizer, or the test itself, says of the kernels."""
    for order, seed, resident in SCHEDULES[SANITIZER]:
        try:
            small(stem)(Machine(EmulatedLoader(order, seed, resident, folder)))
        except Exception:
            yield traceback.format_exc(limit=-2)


def unnoticed() -> Iterator[str]:
    """Mistakes, of tests/cuda_on_cpu/mistakes.cu, that the sanitizer does not report."""
    words, numbers = np.zeros(64, np.int32), np.zeros(8, np.float32)
    one = np.zeros(1, np.uint32)
    cases = {
        "address": [
            ("write_at", 1, 1, (numbers, np.int32(8)), False, "buffer-overflow"),
            ("write_at", 1, 1, (numbers, np.int32(-1)), False, "buffer-overflow"),
            ("read_at", 1, 1, (numbers, numbers, np.int32(8)), False, "buffer-overflow"),
            ("static_shared_at", 1, 1, (numbers, np.int32(8)), False, "buffer-overflow"),
            ("dynamic_shared_at", 1, 1, (numbers, np.int32(9)), False, "use-after-poison"),
        ],
        "thread": [
            ("no_syncwarp", 1, 32, (words, words), False, "data race"),
            ("no_syncthreads", 1, 64, (words, words), False, "data race"),
            ("add_between_blocks", 2, 32, (one,), True, "data race"),
        ],
    }[SANITIZER]
    for name, grid, block, args, resident, report in cases:
        loader = EmulatedLoader("random", 0, resident, HERE)
        kernel = loader.function("mistakes", name, ("REAL_BF16=0",))
        try:
            kernel((grid,), (block,), args, shared_mem=36)
        except KernelError as error:
            if report in str(error):
                continue
        yield name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=SCHEDULES)
    parser.add_argument("stems", nargs="*", help="default: all")
    parser.add_argument("--kernels", type=Path, default=KERNELS, help="folder of the .cu files")
    wanted = parser.parse_args()
    if wanted.kind != SANITIZER:
        parser.error("run this in the environment that tests.cuda_on_cpu.sanitize makes")
    dirty = []
    if not wanted.stems:
        dirty += [f"{name} is not reported" for name in unnoticed()]
        print("mistakes:", *dirty or ["all reported"], flush=True)
    for stem in wanted.stems or stems():
        found = list(failures(stem, wanted.kernels))
        dirty += found
        print(f"{stem}:", *found or ["clean"], flush=True)
    return bool(dirty)


if __name__ == "__main__":
    sys.exit(main())
