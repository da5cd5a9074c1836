"""The parts that prove: tests on the GPU, and kernels under a memory checker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gpu_microgpt.errors import BackendError
from gpu_microgpt.ops.cuda.cache import KernelCache
from gpu_microgpt.ops.cuda.catalog import CATALOG
from gpu_microgpt.ops.cuda.compiler import Program, compiler_release, kernels_folder, resources
from tests.gpu_suite.parts import ROOT, waited_for
from tests.gpu_suite.places import backend
from tests.gpu_suite.results import Results

ON_GPU = ("tests/cuda", "tests/cuda_on_cpu", "tests/backend")
PLACE = "gpu"  # test bodies that run in several places are named after them: [gpu-bfloat16]
DRY = ("tests/cuda/test_relu.py", "-k", "small and lifo")
TOOLS = ("memcheck", "racecheck")
DRY_STEMS = ("relu",)
NOT_HERE = "Device not supported"  # what the checker says where it cannot look into the GPU


class Progress:
    """Counts tests as they end, so that what was done is known even of a part that was stopped."""

    def __init__(self, results: Results, place: str = "") -> None:
        """`place`: leave out the tests of any other, which is most of them."""
        self._place = place
        self._results, self._counts = results, {"passed": 0, "failed": 0, "skipped": 0}
        self._written = 0.0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self._place:
            items[:] = [item for item in items if self._place in places_of(item)]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._results.put("selected", len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._results.put("running", nodeid)

    def pytest_sessionfinish(self) -> None:
        self._results.put("running", "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self._counts[report.outcome] += 1
        if report.failed:
            last = (report.longreprtext.strip().splitlines() or ["no message"])[-1]
            self._results.fail(f"{report.nodeid}: {last}")
        if report.failed or time.monotonic() > self._written + 0.5:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        self._results.put("counts", dict(self._counts))


def places_of(item: pytest.Item) -> list[str]:
    """The parameters in a test's name."""
    return item.name.partition("[")[2].rstrip("]").split("-")


def tests(results: Results, dry_run: bool) -> None:
    """All tests that run on a GPU."""
    os.chdir(ROOT)
    progress = Progress(results, "" if dry_run else PLACE)
    if not dry_run:  # what is compared with is NumPy's: Numba would compile for a minute first
        sys.modules["numba"] = None  # type: ignore[assignment]
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "-x" if dry_run else "--tb=short"]
    code = pytest.main([*(DRY if dry_run else ON_GPU), *options], plugins=[progress])
    progress.write()
    if code and not results.failed:
        results.fail(f"pytest: {pytest.ExitCode(code).name.lower().replace('_', ' ')}")


def kernels(results: Results, dry_run: bool) -> None:
    """Compile every kernel for this GPU, several at once: other parts find them in the cache. Says
    what this compiler keeps in local memory, which costs time: others keep nothing there."""
    with backend(dry_run) as cuda:
        device = cuda.gpu.device
    programs = [
        Program.read(
            kernels_folder() / f"{variant.stem}.cu", device.arch,
            [f"REAL_BF16={int(dtype == 'bfloat16')}",
             *(f"{name}={number}" for name, number in variant.constants.items())],
        )
        for variant in CATALOG
        for dtype in variant.dtypes
        if (device.tensor_cores or not variant.tensor_cores)
        and (not dry_run or variant.stem in DRY_STEMS)
    ]  # fmt: skip
    try:
        results.put("nvrtc", compiler_release())
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            logs = [compiled.log for compiled in pool.map(KernelCache().compiled, programs)]
    except BackendError as failure:
        if not dry_run:  # which needs no compiler
            raise
        results.skip(str(failure))
        return
    results.put("compiled", len(logs))
    for program, log in zip(programs, logs, strict=True):
        for kernel, used in resources(log).items():
            if local := used.stack + used.spill_stores + used.spill_loads:
                results.skip(f"{program}: {kernel} keeps {local} bytes a thread in local memory")


def sanitizer(results: Results, dry_run: bool) -> None:
    """Every kernel under compute-sanitizer, as far as time allows."""
    tool = _compute_sanitizer()
    if tool is None:
        results.skip("compute-sanitizer is not here (it comes with the CUDA toolkit)")
        return
    which = ["--emulated", *DRY_STEMS] if dry_run else []
    kernels = [sys.executable, "-m", "tests.gpu_suite.small", *which]
    for i, kind in enumerate(TOOLS):
        limit = (results.left() - 2) / (len(TOOLS) - i)
        command = [tool, "--tool", kind, "--error-exitcode", "9", *kernels]
        row = _checked(command, limit)
        results.put(kind, {"done": row["done"], "seconds": row["seconds"]})
        if NOT_HERE in row["output"]:
            results.skip(f"{kind}: compute-sanitizer says: {NOT_HERE}")
        elif row["code"] is None:
            results.skip(f"{kind}: stopped after {limit:.0f} s, clean so far")
        elif row["code"]:
            said = [x for x in row["output"].splitlines() if x.startswith("=========")]
            results.fail(f"{kind}: {'; '.join(x.strip('= ') for x in said[1:4]) or row['output']}")


def _checked(command: list[str], limit: float) -> dict[str, Any]:
    """Run it; its code (None: out of time), all it said, and which kernels it came to."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as file:  # a pipe would wait for the checker's children
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
        code = waited_for(process, limit)
        file.seek(0)
        output = file.read()
    done = [x.partition(":")[0] for x in output.splitlines() if x.endswith(": done")]
    return {"code": code, "output": output, "done": done, "seconds": time.monotonic() - start}


def _compute_sanitizer() -> str | None:
    """Where it is: in the path, or in a CUDA toolkit."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home) / "bin" for home in (*homes, "/usr/local/cuda") if home]
    return shutil.which("compute-sanitizer") or next(
        (found for place in places if (found := shutil.which("compute-sanitizer", path=place))),
        None,
    )
