"""The suite's results as JSON and as Markdown, written anew after every part."""

from __future__ import annotations

import itertools
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gpu_suite.parts import INTERRUPTED
from tests.gpu_suite.targets import targets

FILES = ("suite.json", "suite.md")
STAND_IN = "stand-in: figures mean nothing"
Row = dict[str, Any]


def prepared(out: Path) -> Path:
    """The folder, made, an earlier report in it renamed; or another where it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        if earlier := [out / name for name in FILES if (out / name).exists()]:
            number = next(n for n in itertools.count(1) if not any(out.glob(f"suite-{n}.*")))
            for path in earlier:
                path.rename(path.with_stem(f"suite-{number}"))
            print(f"{out}: an earlier report is now suite-{number}", flush=True)
    except OSError as failure:
        other = Path(tempfile.mkdtemp(prefix="gpu_suite-"))
        print(f"{out}: {failure.strerror}; results go to {other}", flush=True)
        return other
    return out


def write(suite: Row, out: Path) -> None:
    """suite.json and suite.md, each in one piece; a line where that is impossible."""
    try:
        _write(suite, out)
    except OSError as failure:
        print(f"{out}: not written: {failure.strerror}", flush=True)


def _write(suite: Row, out: Path) -> None:
    texts = json.dumps(suite, indent=1) + "\n", markdown(suite)
    for name, text in zip(FILES, texts, strict=True):
        partial = out / f".{name}.partial"
        partial.write_text(text, "utf-8")
        os.replace(partial, out / name)


def line(row: Row) -> str:
    """A part in one line."""
    results = row["results"]
    notes = [*results.get("failures", []), *results.get("skipped", [])]
    if row["status"] == "timed out":
        notes.insert(0, f"stopped after {row['limit']:g} s" + doing(results))
    elif row["status"] == "failed" and row.get("code", 0) < 0:
        notes.insert(0, f"ended by {signal.Signals(-row['code']).name}" + doing(results))
    elif row["status"] == "failed" and not results.get("failures"):
        notes.insert(0, (row.get("last_lines") or [f"exit code {row.get('code')}, no output"])[-1])
    if row["status"] == INTERRUPTED:
        notes.insert(0, "the suite was stopped here")
    if "stuck" in row:
        notes.insert(0, f"killed, but process {row['stuck']} does not end")
    if counts := results.get("counts"):
        notes.insert(0, ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return f"{row['name']}: {row['status']}, {row['seconds']:g} s" + "".join(
        f"; {note}" for note in notes
    )


def doing(results: Row) -> str:
    """What a part was at, where that is known."""
    return f" in {results['running']}" if results.get("running") else ""


def markdown(suite: Row) -> str:
    """The whole report."""
    found = {row["name"]: row["results"] for row in suite["parts"]}
    sections = (
        _head(suite, found), _parts(suite), _targets(suite, found), _steps(found), _ops(found),
        _generation(found), _runs(found), _failures(suite),
    )  # fmt: skip
    return "\n".join(line for section in sections for line in section) + "\n"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """In Markdown, with an empty line behind."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def _head(suite: Row, found: Row) -> Iterator[str]:
    environment = found.get("environment", {})
    gpu = environment.get("gpu", {})
    yield f"# GPU suite: {gpu.get('name', 'no GPU')}"
    yield ""
    if suite["dry_run"]:
        yield f"**{STAND_IN}.**"
        yield ""
    versions = environment.get("packages", {})
    for name, value in {
        "GPU": gpu.get("description"),
        "cuBLASLt": gpu.get("cublaslt"),
        "nvidia-smi": environment.get("nvidia-smi"),
        "processor": environment.get("processor"),
        "python": environment.get("python"),
        "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": suite["commit"],
        "command": suite["command"],
        "started": suite["started"],
    }.items():
        if value:
            yield f"- {name}: {value}"
    yield ""


def _parts(suite: Row) -> Iterator[str]:
    rows = []
    for row in suite["parts"]:
        note = line(row).partition("; ")[2]
        rows.append([row["name"], row["status"], f"{row['seconds']:g}", f"{row['limit']:g}", note])
    total = sum(row["seconds"] for row in suite["parts"])
    yield from table(["part", "result", "seconds", "limit", "notes"], rows)
    yield f"{total:.0f} s in all."
    yield ""


def _targets(suite: Row, found: Row) -> Iterator[str]:
    yield from ("## Targets", "")
    rows = []
    for name, got, reached in targets(found):
        verdict = "" if reached is None else "reached" if reached else "not reached"
        rows.append([name, got or "not measured", STAND_IN if suite["dry_run"] else verdict])
    yield from table(["wanted", "measured", ""], rows)


def _steps(found: Row) -> Iterator[str]:
    """Ours, and PyTorch's beside it."""
    measured = {name: found[name] for name in found if name.startswith("steps:")}
    with_ours = {name: r for name, r in measured.items() if "ours" in r}
    if not with_ours:
        return
    yield from ("## Training step", "")
    rows, peers = [], []
    for r in with_ours.values():
        ours, setting = r["ours"], r["setting"]
        title = f"{setting['title']}, batch {setting['batch_size']}"
        rows.append([
            title, f"{setting['parameters']:,}", f"{ours['ms']:.4g}",
            f"{ours['tokens_per_second']:,.0f}", f"{ours['tflops']:.1f}",
            share(ours["share_of_peak"]), f"{ours['host_us']:.1f}", str(ours["allocations"]),
            f"{ours['memory_bytes'] / 2**20:,.0f}", setting["text"],
        ])  # fmt: skip
        for name, peer in r.get("peers", {}).items():
            peers.append([title, name, f"{peer['ms']:.4g}", f"{peer['ratio']:.2f}"])
    columns = [
        "model", "parameters", "ms/step", "tokens/s", "TFLOP/s", "of peak", "host us/step",
        "allocations after the first step", "MiB", "text",
    ]  # fmt: skip
    yield from table(columns, rows)
    if peers:
        yield next(r["torch"] for r in with_ours.values() if "torch" in r) + ":"
        yield ""
        yield from table(["model", "PyTorch", "ms/step", "PyTorch / ours"], peers)


def _ops(found: Row) -> Iterator[str]:
    """A table a size, with shares of this machine's best."""
    rows, best = found.get("ops", {}).get("ops", []), found.get("ceilings", {})
    cache = found.get("environment", {}).get("gpu", {}).get("l2_bytes", 0)
    if best:
        yield from ("## Ceilings", "")
        yield f"- copy of {best.get('copy_bytes', 0):,} bytes: {rate(best, 'copy_gb_s')} GB/s"
        size = best.get("product_size", 0)
        yield f"- product {size} x {size} x {size}: {rate(best, 'product_tflops')} TFLOP/s"
        yield ""
    for case in dict.fromkeys(row["case"] for row in rows):
        yield from (f"## Operations: {case}", "")
        cells = []
        for row in rows:
            if row["case"] == case:
                gb, tflops = row["bytes"] / row["us"] / 1e3, row["flops"] / row["us"] / 1e6
                cells.append([
                    row["op"], f"{row['us']:.4g}", f"{row['bytes'] / 1e6:.4g}", f"{gb:,.0f}",
                    share_of(gb, best.get("copy_gb_s")),
                    *(["", "", ""] if not row["flops"] else [
                        f"{row['flops'] / 1e9:.4g}", f"{tflops:.1f}",
                        share_of(tflops, best.get("product_tflops")),
                    ]), how(row, cache),
                ])  # fmt: skip
        columns = [
            "operation", "us", "MB", "GB/s", "of the copy", "GFLOP", "TFLOP/s", "of the product",
            "how",
        ]  # fmt: skip
        yield from table(columns, cells)


def _generation(found: Row) -> Iterator[str]:
    if not (rows := found.get("generation", {}).get("texts")):
        return
    yield from ("## Generation", "")
    cells = [
        [r["case"], f"{r['sequences']}", f"{r['tokens_per_second']:,.0f}",
         f"{r['us_per_position']:.1f}"] for r in rows
    ]  # fmt: skip
    yield from table(["model", "texts at once", "tokens/s", "us a token of all"], cells)


def _runs(found: Row) -> Iterator[str]:
    runs = {name: r for name, r in found.items() if name.startswith("train:") and r.get("run")}
    if not runs:
        return
    yield from ("## Real runs", "")
    cells = []
    for r in runs.values():
        run = r["run"]
        cells.append([
            f"`{r['command']}`", f"{run['steps']:,}", rate(r, "seconds"), rate(run, "ms_per_step"),
            rate(run, "loss/train"), rate(run, "loss/val"),
        ])  # fmt: skip
    columns = ["command", "steps", "seconds in all", "ms/step", "training loss",
               "lowest held-out loss"]  # fmt: skip
    yield from table(columns, cells)
    for r in runs.values():
        yield from (f"- {said}" for said in r.get("said", []) if said.startswith("data:"))
    yield ""


def _failures(suite: Row) -> Iterator[str]:
    """Last words of what failed."""
    for row in suite["parts"]:
        if row["status"] != "ok":
            yield from (f"## {row['name']}: {row['status']}", "", "```")
            yield from row["results"].get("failures", [])
            yield from row.get("last_lines", [])
            yield from ("```", "")


def rate(row: Row, name: str) -> str:
    """A number to four digits, or nothing."""
    return f"{row[name]:,.4g}" if row.get(name) is not None else ""


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def share_of(value: float, best: float | None) -> str:
    return share(value / best if best else None)


def how(row: Row, cache: int) -> str:
    """Algorithms by the first bytes of what the library describes them with; and whether all fits
    into so many bytes of L2 cache."""
    names = [f"algorithm {choice[:16]}" for choice in row.get("algorithms", [])]
    if "fused" in row:
        names.insert(0, "relu in one" if row["fused"] else "relu apart")
    return ", ".join(names + ["fits L2"] * (row["bytes"] < cache))
