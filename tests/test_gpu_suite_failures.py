"""The GPU suite where something fails, hangs or is stopped: a line in the report, and the rest."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the suite is for Linux", allow_module_level=True)

from tests.cuda_on_cpu.compiler import require_compiler
from tests.gpu_suite import __main__ as suite
from tests.gpu_suite import parts
from tests.gpu_suite.parts import ROOT, run
from tests.gpu_suite.report import line
from tests.gpu_suite_helpers import ENVIRONMENT, python, written


def test_a_failing_part_is_reported_and_the_others_go_on(tmp_path, capsys):
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid); "
    parts = [
        ENVIRONMENT,
        python("raises", 5, "print('before'); raise ValueError('boom')"),
        python("hangs", 1, child + "sys.stdout.flush(); p.wait()"),
        python("fine", 5, "print('fine')"),
    ]
    arguments = ["--out", str(tmp_path), "--budget", "16", "--commit", "abc"]
    assert suite.main(arguments, parts) == 1
    found = written(tmp_path)
    assert found["commit"] == "abc"
    rows = {part["name"]: part for part in found["parts"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "environment": "ok", "raises": "failed", "hangs": "timed out", "fine": "ok",
    }  # fmt: skip
    assert rows["raises"]["last_lines"][-1] == "ValueError: boom"
    assert rows["hangs"]["seconds"] < 4
    (pid,) = rows["hangs"]["last_lines"]
    assert gone(pid)
    text = (tmp_path / "suite.md").read_text("utf-8")
    assert "## raises: failed" in text
    assert "ValueError: boom" in text
    assert "hangs: timed out" in capsys.readouterr().out


def test_what_a_part_found_before_it_ended_is_kept(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from tests.gpu_suite.results import Results; "
        f"Results(Path({str(tmp_path)!r}, 'a-b.json'), 9).put('found', 7); time.sleep(60)"
    )
    row = run(python("a:b", 0, code), 3, False, tmp_path)
    assert (row["status"], row["results"]) == ("timed out", {"found": 7})


def gone(pid: str) -> bool:
    state = Path("/proc", pid, "stat")
    return not state.exists() or state.read_text("utf-8").rpartition(")")[2].split()[0] == "Z"


def test_what_a_part_started_in_another_group_is_ended_too(tmp_path):
    code = (
        "import subprocess, time; "
        "print(subprocess.Popen(['sleep', '60'], process_group=0).pid, flush=True); time.sleep(60)"
    )
    row = run(python("a", 0, code), 1, False, tmp_path)
    assert row["status"] == "timed out"
    assert gone(row["last_lines"][0])


class Stuck:
    """A process that the driver does not let go."""

    pid, waits = 2**22 + 1, 0  # a number that no process has

    def wait(self, seconds: float) -> int:
        self.waits += 1
        raise subprocess.TimeoutExpired("stuck", seconds)


def test_a_process_that_cannot_be_killed_holds_nothing_up(tmp_path):
    process = Stuck()
    assert parts.waited_for(process, 0.1) is None
    assert process.waits == 2
    row = {"name": "x", "status": "timed out", "seconds": 9.0, "limit": 4.0, "results": {}}
    assert line({**row, "stuck": 7}) == (
        "x: timed out, 9 s; killed, but process 7 does not end; stopped after 4 s"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_part_and_is_reported(number, tmp_path):
    require_compiler()
    command = [sys.executable, "-m", "tests.gpu_suite", "--dry-run", "--only", "tests"]
    suite = subprocess.Popen(
        [*command, "--out", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert suite.stdout is not None
    assert suite.stdout.readline().startswith("environment: ok")
    suite.send_signal(number)
    told = suite.communicate(timeout=30)[0]
    assert suite.returncode == 1
    assert "tests: interrupted" in told
    (_, row) = written(tmp_path)["parts"]
    assert row["status"] == "interrupted"
    assert "## tests: interrupted" in (tmp_path / "suite.md").read_text("utf-8")


def test_a_gpu_that_was_found_in_time_is_enough(tmp_path, monkeypatch):
    """What the environment came to no end with is downloads."""
    found, read = {"gpu": {"name": "H200"}}, parts._read
    monkeypatch.setattr(parts, "_read", lambda path: found if "env" in path.name else read(path))
    slow = python("environment", 2, "import time; time.sleep(60)")
    arguments = ["--out", str(tmp_path), "--budget", "8"]
    assert suite.main(arguments, [slow, python("next", 6, "")]) == 1
    rows = {part["name"]: part["status"] for part in written(tmp_path)["parts"]}
    assert rows == {"environment": "timed out", "next": "ok"}


def test_a_folder_that_cannot_be_written_is_replaced(tmp_path, capsys):
    (tmp_path / "file").write_text("", "utf-8")
    assert suite.main(["--out", str(tmp_path / "file" / "out")], [ENVIRONMENT]) == 0
    told = capsys.readouterr().out
    assert "out: Not a directory; results go to " in told
    other = Path(told.rstrip().rpartition("written to ")[2])
    assert [part["name"] for part in written(other)["parts"]] == ["environment"]
    shutil.rmtree(other)


def test_a_disk_that_fills_up_stops_nothing(tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tests.gpu_suite.report._write", full)
    assert suite.main(["--out", str(tmp_path)], [ENVIRONMENT, python("next", 5, "")]) == 0
    told = capsys.readouterr().out
    assert "not written: No space left on device" in told
    assert "next: ok" in told


def test_an_earlier_report_is_kept(tmp_path, capsys):
    for number in (1, 2, 3):
        arguments = ["--out", str(tmp_path), "--commit", str(number)]
        assert suite.main(arguments, [ENVIRONMENT]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{stem}.{kind}" for stem in ("suite", "suite-1", "suite-2") for kind in ("json", "md")
    )
    assert written(tmp_path)["commit"] == "3"
    assert json.loads((tmp_path / "suite-2.json").read_text("utf-8"))["commit"] == "2"
    assert "an earlier report is now suite-2" in capsys.readouterr().out


def test_a_part_that_hangs_says_where(tmp_path):
    code = (
        "import sys, time; from tests.gpu_suite import work; "
        "work.work = lambda *_: time.sleep(60); "
        f"sys.argv[1:] = ['tests', '--result', {str(tmp_path / 'a.json')!r}, '--seconds', '2']; "
        "work.main()"
    )
    row = run(python("a", 0, code), 4, False, tmp_path)
    said = "\n".join(row["last_lines"])
    assert "most recent call first" in said
    assert "in main" in said


def test_a_crash_is_told_with_its_signal_and_its_test(tmp_path):
    code = (
        "import ctypes; from pathlib import Path; from tests.gpu_suite.results import Results; "
        f"Results(Path({str(tmp_path)!r}, 'a.json'), 9).put('running', 't[gpu]'); "
        "ctypes.string_at(0)"
    )
    row = run(python("a", 0, code), 5, False, tmp_path)
    assert "; ended by SIGSEGV in t[gpu]" in line(row)
    assert any("Segmentation fault" in said for said in row["last_lines"])
    row = run(python("b", 0, "import os; os._exit(7)"), 5, False, tmp_path)
    assert line(row).endswith("; exit code 7, no output")


def test_nothing_runs_without_an_environment(tmp_path, capsys):
    parts = [python("environment", 5, "raise SystemExit(1)"), python("never", 5, "")]
    assert suite.main(["--out", str(tmp_path)], parts) == 1
    assert [part["name"] for part in written(tmp_path)["parts"]] == ["environment"]
    assert "nothing else can run" in capsys.readouterr().out


def test_a_failure_is_told_in_the_parts_line():
    row = {"name": "x", "status": "failed", "seconds": 1.0, "limit": 2.0, "results": {}}
    assert line({**row, "last_lines": ["a", "the end"]}) == "x: failed, 1 s; the end"
    assert line({**row, "results": {"failures": ["why"]}}) == "x: failed, 1 s; why"
