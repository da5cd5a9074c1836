"""Shared by the tests of operations: operations with exactly the planned scratch memory, outputs
that show what was not written and what was written beside them, comparisons."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpu_microgpt.backend.numpy import NumpyBackend
from gpu_microgpt.dims import Dims
from gpu_microgpt.ops import Ops

GUARD = 3  # rows around every output that must stay as they are
NAMES = {"float32": "fp32", "float64": "fp64"}
IMPLEMENTATION = "reference"  # the fixture `implementation` says which

Arrays = tuple[np.ndarray, ...]


def planned_ops(
    dtype: str, rows: int, *, channels: int = 4, heads: int = 1, block_size: int = 1, vocab: int = 3
) -> Ops:
    """Operations for these sizes; every byte of scratch is 0xFF, which reads as NaN."""
    dims = Dims(1, heads, channels, block_size, vocab)
    if IMPLEMENTATION == "compiled":
        from gpu_microgpt.ops.cpu import CompiledOps, workspace_bytes

        planned = workspace_bytes(dims, rows, np.dtype(dtype).itemsize)
        return CompiledOps(np, np.full(planned, 0xFF, np.uint8), dtype)
    backend = NumpyBackend(NAMES[dtype])
    return backend.ops(np.full(backend.workspace_bytes(dims, rows), 0xFF, np.uint8))


def normal(dtype: str, *shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Random numbers of one value in every dtype: those of float32."""
    draws = np.random.default_rng((seed, *shape)).standard_normal(shape) * scale
    return draws.astype(np.float32).astype(dtype)


def some_targets(rows: int, vocab: int) -> np.ndarray:
    """Every third row is ignored; the first and the last token are among the targets."""
    targets = np.random.default_rng(rows).integers(0, vocab, rows, np.int32)
    targets[1:2] = 0
    targets[0] = vocab - 1
    targets[2::3] = -1
    return targets


def blank(dtype: str, *shape: int, fill: float = np.nan) -> np.ndarray:
    """An output full of NaN (or `fill`), cut out of a taller array of NaN."""
    taller = np.full((shape[0] + 2 * GUARD, *shape[1:]), np.nan, dtype)
    view = taller[GUARD:-GUARD]
    view[...] = fill
    return view


def within(output: np.ndarray) -> bool:
    """Whether nothing was written beside this `blank`."""
    taller = output.base
    assert taller is not None
    return bool(np.isnan(taller[:GUARD]).all() and np.isnan(taller[-GUARD:]).all())


def twice(run: Callable[[], Arrays]) -> Arrays:
    """The outputs of `run`, which writes into fresh blanks: finite, inside, the same bits again."""
    first, second = run(), run()
    for got, again in zip(first, second, strict=True):
        assert within(got)
        assert np.isfinite(got).all()
        assert got.tobytes() == again.tobytes()
    return first


def assert_close(
    got: np.ndarray, expected: np.ndarray, float32: float = 2e-6, size: float | None = None
) -> None:
    """Compare with a float64 reference: the error is at most `float32` of `size` in float32, and
    as many roundings in float64. `size`: of the largest number, or of terms that cancel."""
    assert got.shape == expected.shape
    tolerance = float32 if got.dtype == np.float32 else float32 * 1e-8
    error = np.abs(got.astype(np.float64) - expected).max()
    size = np.abs(expected).max() if size is None else size
    assert error <= tolerance * size, f"error {error:.3g} of {size:.3g}"
