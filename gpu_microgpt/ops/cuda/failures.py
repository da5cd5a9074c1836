"""CUDA's errors as one line each: what failed, and whether the GPU can go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import DeviceError

MEMORY = 2  # the same numbers in CUDA's runtime and its driver
# Memory, address, instruction and link errors, time-outs, lost devices: CUDA then answers every
# call with the same error.
DEAD = {46, 214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 999}


def device_error(failure: Exception, doing: str) -> DeviceError | None:
    """What to raise in place of an error of CuPy's, met while `doing`; None: it is not CUDA's.

    CUDA tells the failure of a kernel with any later call: `doing` is where it was noticed.
    """
    status = getattr(failure, "status", None)
    if not isinstance(status, int):
        return None
    text = " ".join(str(failure).split())
    if status == MEMORY:
        return DeviceError(f"the GPU is out of memory ({doing}: {text}): lower train.batch_size")
    if status in DEAD:
        return DeviceError(
            f"the GPU failed ({doing}: {text}); this process cannot use it any more: start anew"
        )
    return DeviceError(f"the GPU refused ({doing}: {text})")


@contextmanager
def device_errors(doing: str) -> Iterator[None]:
    """Raise CUDA's errors as DeviceError."""
    try:
        yield
    except RuntimeError as failure:
        error = device_error(failure, doing)
        if error is None:
            raise
        raise error from None
