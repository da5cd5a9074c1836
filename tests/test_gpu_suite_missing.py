"""The GPU suite where something is missing: packages, a driver, texts, tools, memory."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from types import SimpleNamespace

import pytest

if sys.platform != "linux":
    pytest.skip("the suite is for Linux", allow_module_level=True)

from gpu_microgpt.backend.usable import NoGpuError
from gpu_microgpt.errors import BackendError, DeviceError
from tests.cuda_on_cpu.compiler import require_compiler
from tests.gpu_suite import environment, measured, proofs, work
from tests.gpu_suite.parts import ROOT
from tests.gpu_suite.report import line
from tests.gpu_suite.results import Results
from tests.gpu_suite_helpers import checker


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "part.json", 60)


def test_missing_packages_are_named_with_the_command(results, monkeypatch):
    version = metadata.version

    def without(name: str) -> str:
        if name in ("pydantic", "torch"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    environment.environment(results, dry_run=True)
    assert results.items["failures"] == ["missing: pip install pydantic"]
    assert any("pip install torch" in said for said in results.items["skipped"])


def test_an_old_driver_is_one_line_and_no_more(tmp_path, monkeypatch, capsys):
    def refuse(device_id: int) -> None:
        raise NoGpuError("the driver knows CUDA 12.2, CuPy wants 13.2", "install a newer driver")

    monkeypatch.setattr("gpu_microgpt.backend.cupy.open_gpu", refuse)
    monkeypatch.setattr(environment, "find_spec", lambda name: name)
    path = tmp_path / "environment.json"
    arguments = ["work", "environment", "--result", str(path), "--seconds", "9"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds: None)
    with pytest.raises(NoGpuError):
        work.main()
    (said,) = json.loads(path.read_text("utf-8"))["failures"]
    assert said == (
        "NoGpuError: the driver knows CUDA 12.2, CuPy wants 13.2: install a newer driver"
    )
    row = {"name": "environment", "status": "failed", "seconds": 1.0, "limit": 2.0}
    assert line({**row, "results": {"failures": [said]}}).endswith(f"; {said}")


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    def asleep(*_: object, **more: object) -> None:
        time.sleep(5)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", asleep)
    start = time.monotonic()
    assert not environment._reachable("example.org", 0.2)
    assert time.monotonic() - start < 3


def test_without_texts_and_network_there_is_a_line(results, tmp_path, monkeypatch):
    monkeypatch.delenv("GPU_MICROGPT_DATA", raising=False)
    monkeypatch.setattr("gpu_microgpt.data.corpus.cache_folder", lambda: tmp_path)
    monkeypatch.setattr(environment, "_reachable", lambda *_: False)
    environment._texts(results)
    (said,) = results.items["skipped"]
    assert "shakespeare: neither here (GPU_MICROGPT_DATA=FOLDER) nor to be downloaded" in said
    assert not results.failed


def test_a_full_gpu_is_a_line_and_the_next_case_goes_on(results, monkeypatch):
    require_compiler()

    def full(setting, cuda, sequences, tokens):
        if sequences == 2 and "Shakespeare" in setting.title:
            raise DeviceError("the GPU is out of memory: wanted 9 bytes\nand more")
        return {"sequences": sequences}

    monkeypatch.setattr(measured, "write_rate", full)
    measured.generation(results, dry_run=True)
    assert results.items["failures"] == [
        "shakespeare, 2 texts: DeviceError: the GPU is out of memory: wanted 9 bytes"
    ]
    assert results.items["texts"] == [
        {"case": "shakespeare", "sequences": 1}, {"case": "baby-gpt", "sequences": 1},
        {"case": "baby-gpt", "sequences": 2},
    ]  # fmt: skip

    def no_copy(gpu, nbytes):
        raise DeviceError("the GPU is out of memory")

    monkeypatch.setattr(measured, "copy_rate", no_copy)
    monkeypatch.setattr(measured, "product_rate", lambda *_: 7.0)
    measured.ceilings(results, dry_run=True)
    assert "copy_gb_s: DeviceError: the GPU is out of memory" in results.items["failures"][1]
    assert results.items["product_tflops"] == 7.0


def test_another_package_named_tests_is_not_taken_for_ours(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("", "utf-8")
    done = subprocess.run(
        [ROOT / "scripts" / "gpu_suite.sh", "--help"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_on_a_gpu_only_its_own_tests_run(results):
    class Item:
        def __init__(self, name: str) -> None:
            self.name = name

    wanted = ["t[gpu]", "t[gpu-bfloat16-(5, 7)]", "t[documents-gpu]"]
    others = ["test_gpu", "t[stand-in-gpu_x]", "t[fifo-float32]", "t[late engine]"]
    items = [Item(name) for name in (*others, *wanted)]
    proofs.Progress(results, proofs.PLACE).pytest_collection_modifyitems(items)
    assert [item.name for item in items] == wanted


def test_spilled_registers_are_told(results, monkeypatch):
    require_compiler()
    log = (
        "Compiling entry function 'relu' for 'sm_90'\n"
        "8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\nUsed 255 registers"
    )
    cache = SimpleNamespace(compiled=lambda program: SimpleNamespace(log=log))
    monkeypatch.setattr(proofs, "KernelCache", lambda: cache)
    monkeypatch.setattr(proofs, "compiler_release", lambda: "13.0.88")
    proofs.kernels(results, dry_run=True)
    said = "relu.cu REAL_BF16=0 for sm_90: relu keeps 16 bytes a thread in local memory"
    assert results.items["skipped"][0] == said
    assert (results.items["compiled"], results.items["nvrtc"]) == (2, "13.0.88")


def test_without_a_compiler_a_dry_run_goes_on(results, monkeypatch):
    def missing() -> str:
        raise BackendError("CuPy cannot be imported")

    require_compiler()
    monkeypatch.setattr(proofs, "compiler_release", missing)
    proofs.kernels(results, dry_run=True)
    assert results.items["skipped"] == ["CuPy cannot be imported"]


def test_without_a_checker_there_is_a_line(results, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *args, **more: None)
    proofs.sanitizer(results, dry_run=True)
    assert "compute-sanitizer is not here" in results.items["skipped"][0]
    assert not results.failed


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ("echo '========= COMPUTE-SANITIZER'; echo '========= Invalid __global__ write'; exit 9",
         "failures", "memcheck: Invalid __global__ write"),
        ("echo '========= Error: Device not supported'; exit 1", "skipped", "Device not supported"),
        ("echo 'relu: done'; sleep 60", "skipped", "memcheck: stopped after"),
    ],
)  # fmt: skip
def test_what_the_checker_says(body, kind, said, tmp_path, monkeypatch):
    found = checker(tmp_path, body)
    monkeypatch.setattr(proofs, "_compute_sanitizer", lambda: str(found))
    results = Results(tmp_path / "part.json", 4)
    proofs.sanitizer(results, dry_run=True)
    assert said in results.items[kind][0]
    assert results.failed == (kind == "failures")
    assert results.items["memcheck"]["done"] == (["relu"] if "relu" in body else [])
