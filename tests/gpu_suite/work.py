"""One part in a process of its own: python -m tests.gpu_suite.work PART --result FILE ..."""

from __future__ import annotations

import argparse
import faulthandler
import sys
from pathlib import Path

from tests.gpu_suite.environment import environment
from tests.gpu_suite.parts import PARTS
from tests.gpu_suite.results import Results

NOTICE = 1.5  # seconds before its end that a part which hangs says where


def work(name: str, results: Results, dry_run: bool) -> None:
    """Do a part. What needs packages is imported here: `environment` says which are missing."""
    part, _, case = name.partition(":")
    if part == "environment":
        environment(results, dry_run)
        return
    from tests.gpu_suite import measured, proofs, real_run

    if part == "steps":
        measured.steps(results, case, dry_run)
    elif part == "train":
        real_run.real_run(results, case, dry_run)
    else:
        {
            "kernels": proofs.kernels,
            "tests": proofs.tests,
            "sanitizer": proofs.sanitizer,
            "ceilings": measured.ceilings,
            "ops": measured.ops,
            "generation": measured.generation,
        }[part](results, dry_run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[part.name for part in PARTS])
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    wanted = parser.parse_args()
    results = Results(wanted.result, wanted.seconds)
    faulthandler.dump_traceback_later(max(0.1, wanted.seconds - NOTICE))
    try:
        work(wanted.part, results, wanted.dry_run)
    except Exception as failure:
        said = str(failure).strip().splitlines() or ["no message"]
        results.fail(f"{type(failure).__name__}: {said[0]}")
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
