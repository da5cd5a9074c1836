"""Prove and measure the CUDA engine on the GPU of this machine: scripts/gpu_suite.sh.

Each part runs in a process of its own with a time limit. A part that fails is reported and the
others go on; the exit code is then 1. Results are written after every part: suite.json, suite.md.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gpu_suite import report
from tests.gpu_suite.parts import BUDGET, GROUPS, INTERRUPTED, PARTS, ROOT, SPARE, STOP, Part, run

LEAST = 1.0  # seconds that a part is given, whatever those before it took
DRY_BUDGET = 240.0  # seconds: slow machines may be busy with other things


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the parts asked for; `parts`: of which."""
    wanted = _parse(arguments)
    picked = [part for part in parts if not wanted.only or part.group in wanted.only]
    if picked and picked[0].group != "environment":
        picked = [part for part in parts if part.group == "environment"] + picked
    budget = wanted.budget or (DRY_BUDGET if wanted.dry_run else BUDGET)
    suite: dict[str, Any] = {
        "dry_run": wanted.dry_run,
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": wanted.commit or commit(),
        "command": " ".join(["scripts/gpu_suite.sh", *(arguments or sys.argv[1:])]),
        "budget": budget,
        "parts": [],
    }
    out = report.prepared(Path(wanted.out).resolve()) if wanted.out else None
    with tempfile.TemporaryDirectory(prefix="gpu_suite-") as scratch:
        spare, scale = 0.0, budget / sum(part.seconds for part in picked)
        for part in picked:
            share = scale * part.seconds
            limit = max(LEAST, min(SPARE * share, share + spare))
            row = run(part, limit, wanted.dry_run, Path(scratch))
            spare += share - row["seconds"]  # below zero where a killed process took its time
            suite["parts"].append(row)
            print(report.line(row), flush=True)
            out = out or report.prepared(_folder(suite))
            report.write(suite, out)
            if row["status"] == INTERRUPTED:
                break
            if part.group == "environment" and row["status"] != "ok" and not _gpu_of(suite):
                print("nothing else can run without what is missing", flush=True)
                break
    print(f"written to {out}")
    return int(any(row["status"] != "ok" for row in suite["parts"]))


def commit() -> str:
    """Of the clone, with a note where files differ from it."""
    try:
        told = [
            subprocess.run(
                ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "not known (no git clone; --commit names it)"
    return told[0] + (" with changes" if told[1] else "")


def _gpu_of(suite: dict[str, Any]) -> str | None:
    """The name of the GPU that was found."""
    name: str | None = suite["parts"][0]["results"].get("gpu", {}).get("name")
    return name


def _folder(suite: dict[str, Any]) -> Path:
    """Where results go if nobody says: a folder named after the GPU; anywhere without one."""
    name = _gpu_of(suite)
    if suite["dry_run"] or name is None:
        return Path(tempfile.mkdtemp(prefix="gpu_suite-"))
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "docs" / "benchmarks" / "gpu" / slug


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_suite.sh", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a stand-in, at toy sizes")
    parser.add_argument(
        "--only", metavar="PART,...", default="", help=f"some of {', '.join(GROUPS)}"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help=f"in all; default: {BUDGET:.0f}"
    )
    parser.add_argument("--out", metavar="DIR", help="default: docs/benchmarks/gpu/NAME-OF-THE-GPU")
    parser.add_argument("--commit", help="what to call the code, where there is no git clone")
    wanted = parser.parse_args(arguments)
    wanted.only = [name for name in wanted.only.split(",") if name]
    for name in wanted.only:
        if name not in GROUPS:
            parser.error(f"--only: got {name}, wanted some of {', '.join(GROUPS)}")
    if wanted.budget is not None and wanted.budget <= 0:
        parser.error(f"--budget: got {wanted.budget:g}, wanted more than 0 seconds")
    return wanted


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, STOP)
    sys.exit(main())
