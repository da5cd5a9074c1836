"""The GPU suite: all of it on the stand-in, and what it does when something fails or is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

if sys.platform != "linux":
    pytest.skip("the suite is for Linux", allow_module_level=True)

from tests.cuda_on_cpu.compiler import require_compiler
from tests.gpu_suite import __main__ as suite
from tests.gpu_suite import proofs
from tests.gpu_suite.parts import BUDGET, PARTS, ROOT
from tests.gpu_suite.report import STAND_IN, markdown
from tests.gpu_suite.targets import targets
from tests.gpu_suite_helpers import checker, written

CASES = ("shakespeare", "baby-gpt", "124m")


# all of it


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
    kernels = by_name["kernels"]
    assert kernels.get("compiled") == 2 or "CuPy" in kernels["skipped"][0]
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


def test_time_that_a_killed_process_takes_is_not_spent_twice(tmp_path, monkeypatch):
    limits = []

    def pretend(part, limit, dry_run, scratch):
        limits.append(limit)
        taken = limit + (5.0 if part.name == "tests" else 0.0)
        return {
            "name": part.name, "status": "ok", "seconds": taken, "limit": limit, "results": {},
        }  # fmt: skip

    monkeypatch.setattr(suite, "run", pretend)
    assert suite.main(["--out", str(tmp_path)]) == 0
    assert sum(limits) + 5.0 <= BUDGET + 1e-6


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
