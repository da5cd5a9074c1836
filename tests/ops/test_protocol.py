"""Every implementation has the protocol's operations, all of them, with its signatures."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import gpu_microgpt.ops
from gpu_microgpt.ops import Ops
from gpu_microgpt.ops.reference import ReferenceOps
from gpu_microgpt.ops.reference.context import Context

OPS = {name: f for name, f in vars(Ops).items() if inspect.isfunction(f) and name[0] != "_"}
STEMS = {
    "embedding", "rmsnorm", "linear", "relu", "attention", "attention_decode", "softmax",
    "cross_entropy", "adamw", "sample",
}  # fmt: skip
IMPLEMENTATIONS = [ReferenceOps]


def shape_of(function: object) -> list[tuple[str, object, object]]:
    """Names, kinds and defaults of the arguments; their types are mypy's to compare."""
    arguments = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [(a.name, a.kind, a.default) for a in arguments]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPS)
def test_signatures_are_the_protocols(implementation: type, name: str) -> None:
    assert shape_of(getattr(implementation, name)) == shape_of(OPS[name])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_there_is_no_operation_beside_the_protocols(implementation: type) -> None:
    methods = {name for name in dir(implementation) if callable(getattr(implementation, name))}
    assert {name for name in methods - set(dir(Context)) if name[0] != "_"} == set(OPS)


def test_one_operation_one_stem_everywhere() -> None:
    reference = Path(gpu_microgpt.ops.__file__).parent / "reference"
    shared = {"__init__", "context"}
    assert {path.stem for path in reference.glob("*.py")} - shared == STEMS
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert tests >= STEMS
