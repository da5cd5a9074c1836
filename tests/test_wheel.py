"""The wheel: built, installed into a clean environment, and used from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.run_helpers import ROOT

UNREACHABLE = ("NewConnectionError", "ConnectTimeoutError", "Temporary failure in name resolution")


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run outside the repository, with nothing of it on Python's path."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        command, cwd=folder, env=clean, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the hatchling that is installed: no network is asked."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    done = run(*build, "--outdir", str(folder), str(ROOT), folder=folder)
    assert done.returncode == 0, done.stderr
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The `gpu-microgpt` command of a new environment that holds the wheel and what it needs."""
    folder = wheel.parent
    assert run(sys.executable, "-m", "venv", "clean", folder=folder).returncode == 0
    scripts = folder / "clean" / ("Scripts" if os.name == "nt" else "bin")
    done = run(str(scripts / "python"), "-m", "pip", "install", str(wheel), folder=folder)
    if done.returncode and any(sign in done.stdout + done.stderr for sign in UNREACHABLE):
        pytest.skip("the package registry cannot be reached for the wheel's dependencies")
    assert done.returncode == 0, done.stderr
    return scripts / "gpu-microgpt"


def below(folder: str, pattern: str) -> set[str]:
    root = ROOT / folder
    return {str(path.relative_to(root)) for path in root.rglob(pattern) if path.is_file()}


def test_contents(wheel: Path) -> None:
    """The package, the settings and the kernels; no tests, no runs."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"gpu_microgpt"}
    for folder, place in (("configs", "_configs"), ("kernels", "_kernels")):
        wanted = {f"gpu_microgpt/{place}/{name}" for name in below(folder, "*")}
        assert wanted
        assert {name for name in names if name.startswith(f"gpu_microgpt/{place}/")} == wanted
    assert {f"gpu_microgpt/_kernels/{name}" for name in ("device.cuh", "relu.cu")} <= names
    assert {f"gpu_microgpt/{name}" for name in below("gpu_microgpt", "*.py")} <= names


def test_trains_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """Ten steps of `names` on the offline words, then text and figures of what they gave."""
    overrides = ["data.source=stdlib-words", "train.steps=10", "train.log_interval=5"]
    done = run(str(installed), "train", "names", *overrides, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"write text:    gpu-microgpt generate {Path('runs', 'names')}" in done.stdout
    lines = (tmp_path / "runs" / "names" / "metrics.jsonl").read_text(encoding="utf-8")
    steps = [row["step"] for row in map(json.loads, lines.splitlines()) if "loss/train" in row]
    assert steps == [5, 10]
    written = run(str(installed), "generate", "runs/names", "--num-samples", "3", folder=tmp_path)
    assert written.returncode == 0, written.stderr
    assert len(written.stdout.splitlines()) == 3
    scored = run(str(installed), "evaluate", "runs/names", "--json", folder=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["step"] == 10


def test_comes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import gpu_microgpt; print(gpu_microgpt.__file__, gpu_microgpt.__version__)"
    done = run(str(installed.with_name("python")), "-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    path, version = done.stdout.split()
    assert Path(path).is_relative_to(installed.parents[1])
    assert version in next(installed.parents[2].glob("*.whl")).name


def test_finds_its_kernels(installed: Path, tmp_path: Path) -> None:
    """Without CuPy, too."""
    code = "from gpu_microgpt.ops.cuda.compiler import kernels_folder; print(kernels_folder())"
    done = run(str(installed.with_name("python")), "-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip())
    assert found.is_relative_to(installed.parents[1])
    assert {path.name for path in found.iterdir()} == below("kernels", "*")
