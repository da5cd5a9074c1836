"""Every implementation has the protocol's operations, all of them, with its signatures."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest

import gpu_microgpt.ops
from gpu_microgpt.ops import Ops
from gpu_microgpt.ops.cuda import CudaOps
from gpu_microgpt.ops.cuda.compiler import kernels_folder
from gpu_microgpt.ops.reference import ReferenceOps

OPS = {name: f for name, f in vars(Ops).items() if inspect.isfunction(f) and name[0] != "_"}
STEMS = {
    "embedding", "rmsnorm", "linear", "relu", "attention", "attention_decode", "softmax",
    "cross_entropy", "adamw", "sample",
}  # fmt: skip
GRAPH = {"advance", "update_scalars", "forbid", "emit"}  # only a captured graph needs them
IMPLEMENTATIONS = {ReferenceOps: set(OPS), CudaOps: set(OPS)}
if find_spec("numba") is not None:
    from gpu_microgpt.ops.cpu import CompiledOps

    IMPLEMENTATIONS[CompiledOps] = set(OPS)
OWN = IMPLEMENTATIONS | {CudaOps: set(OPS) | GRAPH}
CASES = [(i, name) for i, names in IMPLEMENTATIONS.items() for name in sorted(names)]


def shape_of(function: object) -> list[tuple[str, object, object]]:
    """Names, kinds and defaults of the arguments; their types are mypy's to compare."""
    arguments = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [(a.name, a.kind, a.default) for a in arguments]


@pytest.mark.parametrize(("implementation", "name"), CASES)
def test_signatures_are_the_protocols(implementation: type, name: str) -> None:
    assert shape_of(getattr(implementation, name)) == shape_of(OPS[name])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_there_is_no_operation_beside_the_protocols(implementation: type) -> None:
    methods = {name for name in dir(implementation) if callable(getattr(implementation, name))}
    shared = set(dir(implementation.__base__))
    mine = {name for name in methods - shared if name[0] != "_" and not name.endswith("_scratch")}
    assert mine == OWN[implementation]


def stems(folder: Path, pattern: str = "*.py") -> set[str]:
    return {path.stem.removeprefix("test_") for path in folder.glob(pattern)}


def test_one_operation_one_stem_everywhere() -> None:
    ops, tests = Path(gpu_microgpt.ops.__file__).parent, Path(__file__).parent
    assert stems(ops / "reference") - {"__init__", "context"} == STEMS
    assert stems(tests, "test_*.py") >= STEMS
    kernels = stems(kernels_folder(), "*.cu")
    assert stems(ops / "cuda") >= STEMS | kernels
    assert stems(tests.parent / "cuda", "test_*.py") >= STEMS - {"attention"} | kernels
    # attention has three kernels; the batch and what advances a graph are no operations of a model
    of_no_stem = {stem for stem in kernels if not stem.startswith("attention_")} - STEMS
    assert of_no_stem == {"batch", "step", "decode"}
