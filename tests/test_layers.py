"""Each module imports only from those above it. Read from the source, so that an import inside a
function or for types alone counts too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gpu_microgpt

PACKAGE = "gpu_microgpt"
ROOT = Path(gpu_microgpt.__file__).parent

# Top to bottom; a folder is one layer, inside which imports must only not go round in circles.
ORDER = [
    "version", "errors", "types", "arena", "settings", "config", "schedule", "rng", "dims", "data",
    "ops", "backend", "profile", "params", "activations", "kv_cache", "model", "optim", "step",
    "host_step", "compiled_step", "graph_step", "engine", "memory_plan", "atomic_folder",
    "checkpoint", "snapshot", "run_folder", "generate", "compiled_team", "compiled_generate",
    "graph_generate", "text_model", "evaluate", "event_files", "metrics", "plot", "progress",
    "report", "readings", "signals", "trainer", "bench_rows", "bench_setting", "bench_ours",
    "bench_runs", "bench_torch", "bench_torch_cpu", "bench_jax", "bench_report",
    "bench_gpu_setting", "bench_gpu", "bench_gpu_ops", "bench", "doctor_facts", "doctor_trials",
    "doctor", "arguments", "cli",
    "__init__",
]  # fmt: skip
NUMBA = {"numba", "llvmlite"}  # optional: only in ops/cpu
CUPY = ("backend.", "ops.cuda.")  # the only modules that may import cupy
# of it; neither its maths, slow to launch, nor its cuBLAS, which a capture refuses
SERVICES = {
    "cupy": {"cuda", "ndarray", "__version__"},
    "cupy.cuda": {
        "Event", "MemoryPool", "Stream", "alloc_pinned_memory", "driver", "function",
        "get_current_stream", "get_elapsed_time", "nvrtc", "nvtx", "runtime",
    },
    "cupy.cuda.function": {"Module"},
}  # fmt: skip
PEERS = {"torch": "bench_torch", "jax": "bench_jax"}  # measured against; known there only
NEVER = {"torch", "tensorflow", "jax"}
DYNAMIC = {"import_module", "__import__", "exec", "eval"}


def modules() -> dict[str, Path]:
    """Dotted names inside the package, "ops.reference.relu"; a package is "ops.__init__"."""
    paths = sorted(ROOT.rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


MODULES = modules()


def layer(module: str) -> str:
    return module.partition(".")[0]


def imports(source: str, module: str, known: set[str]) -> set[str]:
    """All that the source of `module` imports: modules of the package by their dotted name inside
    it, others by their first name with a ":" before it. Dynamic imports are ":dynamic"."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {_inside(alias.name, known) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module)
            found |= {_inside(f"{base}.{alias.name}", known) for alias in node.names}
            if DYNAMIC & {alias.name for alias in node.names}:
                found.add(":dynamic")
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in DYNAMIC:
                found.add(":dynamic")
    return found


def _absolute(node: ast.ImportFrom, module: str) -> str:
    """The module a `from` names, with the package's name first where it is relative."""
    if not node.level:
        return node.module or ""
    parents = [PACKAGE, *module.split(".")][: -node.level]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _inside(dotted: str, known: set[str]) -> str:
    """A name as in `imports`: the longest beginning of it that is a module."""
    first, *rest = dotted.split(".")
    if first != PACKAGE:
        return f":{first}"
    for end in range(len(rest), -1, -1):
        for candidate in (".".join(rest[:end]), ".".join([*rest[:end], "__init__"])):
            if candidate in known:
                return candidate
    raise AssertionError(f"{dotted}: no such module")


def faults(module: str, found: set[str]) -> list[str]:
    """What in these imports breaks the rules."""
    broken = []
    for name in found:
        if name[1:] in NEVER and PEERS.get(name[1:]) != module:
            broken.append(f"{module} imports {name[1:]}, wanted nowhere")
        elif name == ":cupy" and not module.startswith(CUPY):
            broken.append(f"{module} imports cupy, wanted only in {' and '.join(CUPY)}")
        elif name[1:] in NUMBA and not module.startswith("ops.cpu."):
            broken.append(f"{module} imports {name[1:]}, wanted only in ops.cpu.")
        elif name == ":dynamic":
            broken.append(f"{module} imports by a name made at run time")
        elif name[0] != ":" and layer(name) != layer(module):
            above = ORDER[: ORDER.index(layer(module))]
            if layer(name) not in above:
                broken.append(f"{module} imports {name}, which lies below it")
    return broken


GRAPH = {
    name: imports(path.read_text("utf-8"), name, set(MODULES)) for name, path in MODULES.items()
}


def test_every_module_has_its_place():
    unknown = {layer(module) for module in MODULES} - set(ORDER)
    assert not unknown, f"add to ORDER: {sorted(unknown)}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_above(module):
    assert faults(module, GRAPH[module]) == []


def names_of_cupy(source: str) -> set[tuple[str, str]]:
    """What is taken of it: (module, name)."""
    tree, found = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            dotted = [alias.name.rpartition(".") for alias in node.names]
            found |= {(module, name) for module, _, name in dotted if module}
    own = any(isinstance(x, ast.Import) and x.names[0].name == "cupy" for x in ast.walk(tree))
    for node in ast.walk(tree) if own else ():
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in SERVICES:
            found.add((ast.unparse(node.value), node.attr))
    return {(module, name) for module, name in found if module.partition(".")[0] == "cupy"}


def test_of_cupy_only_services_are_used():
    used = {m: names_of_cupy(path.read_text("utf-8")) for m, path in MODULES.items()}
    assert {module for module, names in used.items() if names} >= {
        "backend.cupy",
        "ops.cuda.loader",
    }
    for module, names in used.items():
        wrong = [f"{where}.{name}" for where, name in names if name not in SERVICES.get(where, ())]
        assert not wrong, f"{module} uses {wrong}"


@pytest.mark.parametrize(
    "source",
    [
        "from cupy import add",
        "from cupy.linalg import qr",
        "from cupy.cuda import cublas",
        "import cupy.cublas",
        "import cupy\ncupy.matmul(a, b)",
        "import cupy\ncupy.cuda.cublas.create()",
    ],
)
def test_other_uses_of_cupy_are_noticed(source):
    assert any(name not in SERVICES.get(where, ()) for where, name in names_of_cupy(source))


def test_no_circle_of_imports():
    left = {module: {name for name in found if name[0] != ":"} for module, found in GRAPH.items()}
    while free := [module for module, wants in left.items() if not wants & (set(left) - {module})]:
        for module in free:
            del left[module]
    assert not left, f"in or behind a circle: {sorted(left)}"


def test_reading_found_the_imports():
    assert "ops.reference.context" in GRAPH["ops.reference.relu"]
    assert {"activations", "data.batch", ":typing"} <= GRAPH["model"]
    assert "ops.reference.__init__" in GRAPH["backend.numpy"]


KNOWN = {
    "__init__", "errors", "config", "model", "trainer", "data.__init__", "data.batch",
    "ops.__init__", "ops.relu", "ops.cpu.relu", "ops.cuda.__init__", "ops.cuda.relu",
    "backend.cupy", "bench_jax", "bench_torch",
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("model", "from .trainer import Trainer", "imports trainer, which lies below"),
        ("model", "from . import trainer", "imports trainer, which lies below"),
        ("model", "import gpu_microgpt.trainer as t", "imports trainer, which lies below"),
        ("model", "from gpu_microgpt import trainer", "imports trainer, which lies below"),
        ("model", "from gpu_microgpt import load", "imports __init__, which lies below"),
        ("model", "def f():\n    from .trainer import T", "imports trainer, which lies below"),
        ("model", "if TYPE_CHECKING:\n    from .trainer import T", "which lies below"),
        ("data.batch", "from ..model import GPT", "imports model, which lies below"),
        ("data.__init__", "from ..model import GPT", "imports model, which lies below"),
        ("data.__init__", "from ..ops import relu", "imports ops.relu, which lies below"),
        ("ops.cuda.relu", "from ...model import GPT", "imports model, which lies below"),
        ("config", "from .data import pack", "imports data.__init__, which lies below"),
        ("model", "import cupy", "imports cupy"),
        ("ops.relu", "from numba import njit", "imports numba"),
        ("model", "import llvmlite.ir", "imports llvmlite"),
        ("ops.cpu.relu", "import numba\nfrom llvmlite import ir", None),
        ("ops.relu", "import cupy.cuda.nccl", "imports cupy"),
        ("model", "def f():\n    import torch.nn", "imports torch"),
        ("backend.cupy", "from torch import nn", "imports torch"),
        ("bench_torch", "import jax", "imports jax"),
        ("bench_jax", "import jax.numpy", None),
        ("model", "import importlib\nimportlib.import_module('x')", "made at run time"),
        ("model", "from importlib import import_module as i", "made at run time"),
        ("model", "__import__('torch')", "made at run time"),
        ("model", "from .data import batch\nfrom .ops.cuda.relu import relu", None),
        ("trainer", "from gpu_microgpt.model import GPT\nimport numpy", None),
        ("backend.cupy", "import cupy\nfrom ..config import Config", None),
        ("ops.cuda.relu", "import cupy\nfrom . import relu\nfrom .. import relu", None),
    ],
)
def test_the_rules_hold_and_let_pass(module, source, fault):
    found = faults(module, imports(source, module, KNOWN))
    assert (len(found) == 1 and fault in found[0]) if fault else found == []
