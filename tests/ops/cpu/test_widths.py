"""The language and the tiles at the widths of lesser machines, which Numba can be told to be."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="the compiled operations need Numba")

from gpu_microgpt.ops.cpu.code import HAS_FMA, VECTOR_BYTES

SSE = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt"
AVX2 = f"{SSE},+avx,+avx2,+fma,+bmi,+bmi2,+lzcnt"
NAMES = (
    "test_vector.py",
    "test_tile.py",
    "test_rows.py",
    "test_attention.py",
    "test_attention_short.py",
)
FILES = [str(Path(__file__).with_name(name)) for name in NAMES]


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the features are those of x86"
)
@pytest.mark.parametrize(
    ("cpu", "features", "bytes_"), [("haswell", AVX2, 32), ("generic", "", 16)]
)
def test_results_are_right_at_this_width(cpu, features, bytes_):
    if bytes_ > VECTOR_BYTES or (features and not HAS_FMA):
        pytest.skip("this machine cannot run that one's code")
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    probe = "from gpu_microgpt.ops.cpu.code import VECTOR_BYTES; print(VECTOR_BYTES)"
    for command in (["-c", probe], ["-m", "pytest", "-q", "-k", "float32", *FILES]):
        result = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout
        if command[0] == "-c":
            assert int(result.stdout) == bytes_
