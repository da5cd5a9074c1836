"""The GPU suite: all of it on the stand-in, and what it does when something fails or is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("the suite is for Linux", allow_module_level=True)

from tests.cuda_on_cpu.compiler import require_compiler
from tests.gpu_suite import __main__ as suite
from tests.gpu_suite import environment, proofs
from tests.gpu_suite.parts import BUDGET, PARTS, ROOT, Part, run
from tests.gpu_suite.report import STAND_IN, line, markdown
from tests.gpu_suite.results import Results
from tests.gpu_suite.targets import targets

ENVIRONMENT = Part("environment", 5, (sys.executable, "-c", "print('here')"))
CASES = ("shakespeare", "baby-gpt", "124m")


def python(name: str, seconds: float, code: str) -> Part:
    return Part(name, seconds, (sys.executable, "-c", code))


def written(out: Path) -> dict[str, Any]:
    return json.loads((out / "suite.json").read_text("utf-8"))


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "part.json", 60)


# all of it


def checker(folder: Path, body: str) -> Path:
    """A compute-sanitizer that does what `body` says, $@ being the program to check."""
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\nshift 4\n{body}\n", "utf-8")
    path.chmod(0o755)
    return path


def test_dry_run(tmp_path):
    require_compiler()
    checker(tmp_path, 'exec "$@"')
    environment = {
        **os.environ, "PYTHON": sys.executable, "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(
        [ROOT / "scripts" / "gpu_suite.sh", "--dry-run", "--out", "out"], cwd=tmp_path,
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - start < 240
    found = written(tmp_path / "out")
    assert found["dry_run"] is True
    assert [part["name"] for part in found["parts"]] == [part.name for part in PARTS]
    assert {part["status"] for part in found["parts"]} == {"ok"}
    by_name = {part["name"]: part["results"] for part in found["parts"]}
    assert by_name["environment"]["gpu"]["name"] == "H200"
    assert by_name["tests"]["counts"] == {"passed": 1, "failed": 0, "skipped": 0}
    assert [by_name["sanitizer"][tool]["done"] for tool in proofs.TOOLS] == [["relu"], ["relu"]]
    assert by_name["ceilings"]["copy_gb_s"] > 0
    assert by_name["ceilings"]["product_tflops"] > 0
    for case in ("names", *CASES):
        ours = by_name[f"steps:{case}"]["ours"]
        assert ours["ms"] > 0
        assert ours["host_us"] > 0
        assert (ours["allocations"], ours["growth_bytes"]) == (0, 0)
    assert {row["case"] for row in by_name["ops"]["ops"]} == set(CASES)
    assert len(by_name["generation"]["texts"]) == 4
    for name in ("shakespeare", "baby-gpt"):
        real = by_name[f"train:{name}"]
        assert real["run"]["steps"] == 3
        assert real["run"]["loss/val"] > 0
        assert any("stand-in" in said for said in real["said"])
    text = (tmp_path / "out" / "suite.md").read_text("utf-8")
    assert f"**{STAND_IN}.**" in text
    assert "reached" not in text


# failures


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
    state = Path("/proc", pid, "stat")
    assert not state.exists() or state.read_text("utf-8").split()[2] == "Z"
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


def test_nothing_runs_without_an_environment(tmp_path, capsys):
    parts = [python("environment", 5, "raise SystemExit(1)"), python("never", 5, "")]
    assert suite.main(["--out", str(tmp_path)], parts) == 1
    assert [part["name"] for part in written(tmp_path)["parts"]] == ["environment"]
    assert "nothing else can run" in capsys.readouterr().out


def test_a_failure_is_told_in_the_parts_line():
    row = {"name": "x", "status": "failed", "seconds": 1.0, "limit": 2.0, "results": {}}
    assert line({**row, "last_lines": ["a", "the end"]}) == "x: failed, 1 s; the end"
    assert line({**row, "results": {"failures": ["why"]}}) == "x: failed, 1 s; why"


# choosing parts, and time


def test_only_some_parts(tmp_path):
    require_compiler()
    arguments = ["--dry-run", "--only", "ceilings", "--out", str(tmp_path)]
    assert suite.main(arguments) == 0
    assert [part["name"] for part in written(tmp_path)["parts"]] == ["environment", "ceilings"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--only", "stepz"], "--only: got stepz, wanted some of"), (["--budget", "-1"], "--budget")],
)
def test_wrong_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        suite.main(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("used", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("budget", [[], ["--budget", "60"]])
def test_limits_never_exceed_the_budget(used, budget, tmp_path, monkeypatch):
    total, limits = 0.0, []

    def pretend(part, limit, dry_run, scratch):
        nonlocal total
        limits.append(limit)
        total += used * limit
        return {
            "name": part.name, "status": "ok", "seconds": used * limit, "limit": limit,
            "results": {},
        }  # fmt: skip

    monkeypatch.setattr(suite, "run", pretend)
    assert suite.main(["--out", str(tmp_path), *budget]) == 0
    assert total <= float([*budget, BUDGET][-1] if not budget else budget[1]) + 1e-6
    assert len(limits) == len(PARTS)
    assert (limits[1] > limits[0] * PARTS[1].seconds / PARTS[0].seconds) == (used < 1)


def test_the_suite_takes_less_than_nine_minutes():
    assert BUDGET <= 520


def test_results_lie_in_a_folder_named_after_the_gpu():
    row = {"name": "environment", "results": {"gpu": {"name": "NVIDIA H200 NVL"}}}
    folder = suite._folder({"dry_run": False, "parts": [row]})
    assert folder == ROOT / "docs" / "benchmarks" / "gpu" / "nvidia-h200-nvl"
    for dry_run, found in ((True, row["results"]), (False, {})):
        folder = suite._folder({"dry_run": dry_run, "parts": [{**row, "results": found}]})
        assert ROOT not in folder.parents
        folder.rmdir()


# what is missing


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


# the report


def test_targets():
    ours = {"ms": 0.5, "tokens_per_second": 7e5, "host_us": 12.0, "allocations": 0}
    peers = {"eager": {"ms": 9.0, "ratio": 18.0}, "graph": {"ms": 0.45, "ratio": 0.9}}
    found = {
        "steps:shakespeare": {"ours": ours, "peers": peers},
        "steps:124m": {"ours": {**ours, "host_us": 21.0}},
    }
    verdicts = {name: (got, reached) for name, got, reached in targets(found)}
    assert verdicts["shakespeare: at most 0.40 ms/step"] == ("0.5 ms", False)
    assert verdicts["baby-gpt: at most 3.00 ms/step"] == (None, None)
    assert verdicts["124m: at least 600,000 tokens/s"] == ("700,000", True)
    fastest = verdicts["shakespeare: faster than the fastest PyTorch"]
    assert fastest == ("graph takes 0.90 times as long", False)
    assert verdicts["host time a step: at most 20 us"][1] is False
    assert verdicts["no allocation after the first step"][1] is True


def test_a_report_says_what_was_not_measured():
    suite = {
        "dry_run": False, "commit": "abc", "command": "scripts/gpu_suite.sh", "started": "now",
        "parts": [{"name": "environment", "status": "ok", "seconds": 1.0, "limit": 2.0,
                   "results": {"gpu": {"name": "H200"}}}],
    }  # fmt: skip
    text = markdown(suite)
    assert text.startswith("# GPU suite: H200\n")
    assert text.count("not measured") == 9
    assert STAND_IN not in text
