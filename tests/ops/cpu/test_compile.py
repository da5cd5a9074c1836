"""Where compiled code is kept, and what happens where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="the compiled operations need Numba")

from gpu_microgpt.ops.cpu import compile as module  # noqa: E402

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import platformdirs
platformdirs.user_cache_path = lambda name: Path(sys.argv[1]) / name
from gpu_microgpt.ops.cpu.relu import rectify
x = np.ones((3, 5), np.float32)
rectify(x.size, x, x)
print(sum(rectify.stats.cache_hits.values()))
"""


@pytest.fixture(autouse=True)
def _nothing_remembered():
    module._usable_folder.cache_clear()
    yield
    module._usable_folder.cache_clear()


def started(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_a_second_start_loads_what_the_first_compiled(tmp_path):
    package = set(Path(module.__file__).parent.rglob("*.nb*"))
    first, second = started(tmp_path), started(tmp_path)
    assert (first.stdout.strip(), second.stdout.strip()) == ("0", "1")
    assert first.stderr.startswith("compiling the CPU's kernels, once on this machine")
    assert first.stderr.count("\n") == 1
    assert second.stderr == ""
    assert list(tmp_path.rglob("compiled/*/**/*.nbc"))
    assert set(Path(module.__file__).parent.rglob("*.nb*")) == package == set()


def test_why_a_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert module.why_unwritable(tmp_path / "file" / "below") == "Not a directory"
    assert module.why_unwritable(tmp_path / "new") == ""
    assert (tmp_path / "new").is_dir()


def test_an_unwritable_folder_is_said_and_done_without(tmp_path):
    (tmp_path / "gpu_microgpt").write_text("a file where the folder should be")
    result = started(tmp_path)
    assert result.stdout.strip() == "0"
    warning, progress = result.stderr.splitlines()
    assert warning.startswith("warning: cannot write ")
    assert "compiled anew at every start" in warning
    assert progress == "compiling the CPU's kernels: some 40 s"


def test_other_users_of_numba_keep_their_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "theirs")
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "ours")
    module.compiled(_double)
    assert numba.config.CACHE_DIR == "theirs"
    assert (tmp_path / "ours").is_dir()


def _double(x):
    return x + x


def test_changed_sources_have_another_folder(monkeypatch, tmp_path):
    before = module.cache_folder()
    (tmp_path / "compile.py").write_text("other")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "compile.py"))
    module._digest.cache_clear()
    after = module.cache_folder()
    module._digest.cache_clear()
    assert after.parent == before.parent
    assert after != before


def test_changed_constants_of_the_reference_have_another_folder(monkeypatch, tmp_path):
    """EPS of rmsnorm.py is compiled into the kernels."""
    for name in ("cpu", "reference"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "cpu" / "compile.py"))
    folders = set()
    for text in ("EPS = 1e-5", "EPS = 1e-6", "EPS = 1e-5"):
        (tmp_path / "reference" / "rmsnorm.py").write_text(text)
        module._digest.cache_clear()
        folders.add(module.cache_folder())
    module._digest.cache_clear()
    assert len(folders) == 2


def test_constants_are_no_new_specialisation():
    double = module.compiled(_double)

    @module.compiled
    def caller(x):
        return double(1) + double(2) + double(x)

    assert caller(3) == 12
    assert len(double.signatures) == 1


def test_nan_stays_and_division_by_zero_is_infinite():
    @module.compiled
    def divided(x, y):
        return x / y, x != x

    assert divided(1.0, 0.0) == (np.inf, False)
    assert divided(np.nan, 1.0)[1]


def test_two_processes_save_one_after_the_other(tmp_path):
    """Each of a dtype of its own, at once, the first time: both are found again."""
    script = SCRIPT.replace("np.float32)", "sys.argv[2])")
    assert script != SCRIPT
    for wanted in ("0\n", "1\n"):
        running = [
            subprocess.Popen([sys.executable, "-c", script, str(tmp_path), dtype],
                             stdout=subprocess.PIPE, text=True)
            for dtype in ("float32", "float64")
        ]  # fmt: skip
        assert [process.communicate()[0] for process in running] == [wanted, wanted]
    assert list(tmp_path.rglob("compiled/*/lock"))
