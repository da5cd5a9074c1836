"""What this machine has, and what is missing. Only Python's own library is taken for granted."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
import threading
import tomllib
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from tests.gpu_suite.parts import ROOT
from tests.gpu_suite.results import Results

BESIDE = ("pytest", "ml_dtypes")  # what the project's own list does not ask everybody for
OPTIONAL = ("torch", "cuda-pathfinder", "nvidia-cublas", "nvidia-cuda-nvrtc")
QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total"


def environment(results: Results, dry_run: bool) -> None:
    """Versions, the GPU, and texts, downloaded where there is a network."""
    results.put("python", platform.python_version())
    results.put("processor", f"{_processor()}, {os.cpu_count()} cores")
    missing = _packages(results, dry_run)
    _clocks(results)
    if missing:
        results.fail(f"missing: pip install {' '.join(missing)}")
        return
    _gpu(results, dry_run)
    if not dry_run:
        _texts(results)


def _clocks(results: Results) -> None:
    """As nvidia-smi tells them."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        results.put("nvidia-smi", f"{QUERY}: {done.stdout.strip()}")
    except FileNotFoundError:
        results.skip("nvidia-smi is not here: no clocks")
    except subprocess.SubprocessError as failure:
        results.skip(f"nvidia-smi: no clocks: {failure}")


def _packages(results: Results, dry_run: bool) -> list[str]:
    """Note versions; return what pip should install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = [re.split(r"[<>=!\[; ]", line)[0] for line in project["dependencies"]]
    found, missing = {}, []
    for name in (*names, *BESIDE, *OPTIONAL):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing += [name] if name not in OPTIONAL else []
    if find_spec("cupy") is None and not dry_run:
        missing.append("'cupy-cuda13x[ctk]'")
    results.put("packages", found)
    if "torch" not in found:
        results.skip("torch is not installed: nothing is compared with it (pip install torch)")
    return missing


def _gpu(results: Results, dry_run: bool) -> None:
    """The GPU that is measured, as the package sees it."""
    from tests.gpu_suite.places import backend

    with backend(dry_run) as cuda:
        gpu = cuda.gpu
        peak = cuda.peak_flops()
        row = {
            "name": gpu.device.name,
            "arch": gpu.device.arch,
            "description": cuda.describe(),
            "cublaslt": gpu.cublaslt.version,
            "memory_bytes": gpu.memory()[1],
            "l2_bytes": gpu.device.l2_bytes,
            "multiprocessors": gpu.device.multiprocessors,
            "peak_tflops": peak and peak / 1e12,
        }
    results.put("gpu", row)


def _texts(results: Results) -> None:
    """Download what is measured on, where that is quickly possible."""
    from gpu_microgpt.data.corpus import FOLDER_VARIABLE, KNOWN, cache_folder

    folders = [cache_folder(), *map(Path, filter(None, [os.environ.get(FOLDER_VARIABLE)]))]
    lacking = [n for n in KNOWN if not any((f / f"{n}.txt").exists() for f in folders)]
    if not lacking:
        return
    if not _reachable("raw.githubusercontent.com", 3.0):
        results.skip(
            f"{', '.join(lacking)}: neither here ({FOLDER_VARIABLE}=FOLDER) nor to be downloaded: "
            "tokens are made up, and the real run is on other text"
        )
        return
    command = [sys.executable, "scripts/prepare.py", *lacking]
    try:
        subprocess.run(command, cwd=ROOT, timeout=max(1.0, results.left() - 3), check=True)
    except subprocess.SubprocessError as failure:
        results.skip(f"{', '.join(lacking)}: not downloaded: {failure}")


def _reachable(host: str, seconds: float) -> bool:
    """Whether a server answers. On a thread, as looking up its name knows no time limit."""
    answered = threading.Event()

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection((host, 443), timeout=seconds).close()
            answered.set()

    threading.Thread(target=connect, daemon=True).start()
    return answered.wait(seconds)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    return next((x.partition(": ")[2] for x in lines if "model name" in x), platform.processor())
