"""The CPU's benchmark in figures and words: medians, ratios, tables."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .backend.numpy import PIN
from .bench_rows import MEAN, Row
from .bench_setting import Setting
from .errors import UserError
from .version import __version__

UNPINNED = "unpinned"  # ours where OpenBLAS chooses its kernels by itself
GREEDY = 16  # tokens of the likeliest text, to be the same for all engines
NEAR = {False: 1e-4, True: 1e-2}  # how far losses may lie apart, relative: float32, bf16

HOW = """\
Every measurement runs in a process of its own, ours and the peers' in turn; figures are medians
over the rounds, ratios medians of the rounds' ratios, above 1 where ours is better. No thread is
pinned to a core. All engines start from the same weights and take the same batches; their first
losses agree. Ours makes its batches inside the time measured, peers have theirs ready. Documents
are padded for the peers, as their users pad them; ours computes real positions only."""
WORK = """\
FLOPs are those needed: real positions, attention's causal half, nothing computed twice. sgemm:
GFLOP/s of NumPy's BLAS in float32 (for bf16 rows too), 2048 x 2048, one product a thread side by
side, in the same process. Cores busy: processor time of a second of steps."""
SECTIONS: tuple[tuple[str, str], ...] = (
    ("us/sample", "Names, microseconds a sample, one thread"),
    ("ms/step", "Larger models, milliseconds a step, all cores"),
    ("tokens/s", "Writing text, tokens a second"),
    ("s", "Whole processes, seconds from start to end"),
    ("MB", "Whole processes, megabytes resident at most"),
)


def figure(row: Row, setting: Setting, run: Mapping[str, Any]) -> float:
    """What the row gives of one measurement, in its unit."""
    if row.kind == "train":
        per_sample = 1e3 / setting.config.train.batch_size
        return float(run["ms"]) * (per_sample if row.unit == "us/sample" else 1)
    return float(
        run[{"generate": "tokens_per_second", "memory": "megabytes"}.get(row.kind, "seconds")]
    )


def told(row: Row, setting: Setting, run: Mapping[str, Any]) -> str:
    """One measurement in a few words."""
    if "refused" in run:
        return f"not measured: {run['refused']}"
    return f"{figure(row, setting, run):.4g} {row.unit}"


def summary(
    name: str, row: Row, setting: Setting, runs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Medians over the rounds of {engine: its measurements}. Raises UserError where engines do not
    compute the same."""
    refusals = {e: run["refused"] for e, found in runs.items() for run in found if "refused" in run}
    done = {engine: found for engine, found in runs.items() if engine not in refusals}
    values = {e: [figure(row, setting, run) for run in found] for e, found in done.items()}
    result: dict[str, Any] = {
        "row": name, "title": row.title, "unit": row.unit, "corpus": setting.corpus.name,
        "params": setting.dims.num_params, "peers": {},
    }  # fmt: skip
    if "ours" in done:
        result |= _engine(done["ours"], values["ours"]) | _work(row, setting, done["ours"])
        if UNPINNED in done:
            more = _engine(done[UNPINNED], values[UNPINNED])
            result[UNPINNED] = more | _work(row, setting, done[UNPINNED])
    else:
        result["refused"] = refusals["ours"]
    for engine in runs:
        if engine in ("ours", UNPINNED):
            continue
        if engine not in done:
            result["peers"][engine] = {"refused": refusals[engine]}
            continue
        peer = result["peers"][engine] = _engine(done[engine], values[engine])
        if "ours" in done:
            _check_same(name, row, engine, done["ours"][0], done[engine][0])
            pairs = zip(values["ours"], values[engine], strict=True)
            ratios = [a / b if row.more_is_better else b / a for a, b in pairs]
            peer["ratio"] = statistics.median(ratios)
    return result


def _engine(runs: Sequence[Mapping[str, Any]], values: Sequence[float]) -> dict[str, Any]:
    """One engine's figure, and what it said of itself."""
    kept = ("engine", "positions", "cores", "ops", "loss", "steps", "again", "runs")
    return {"value": statistics.median(values), "values": list(values),
            **{key: runs[0][key] for key in kept if key in runs[0]}}  # fmt: skip


def _work(row: Row, setting: Setting, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """FLOPs of a step or a token on real positions, and what share of BLAS's rate ours has."""
    if row.kind == "train":
        flops = setting.flops()
        rate = flops / statistics.median(run["ms"] for run in runs) / 1e6
    elif row.kind == "generate":
        length = setting.dims.block_size - 1
        flops = setting.dims.train_flops(1, length) / 3  # forward only
        rate = flops * statistics.median(run["tokens_per_second"] for run in runs) / 1e9
    else:
        return {}
    peak = statistics.median(run["sgemm_gflops"] for run in runs)
    return {"flops": flops, "gflops": rate, "sgemm_gflops": peak, "share_of_peak": rate / peak}


def _check_same(
    name: str, row: Row, engine: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> None:
    """Raise UserError unless the first losses agree, or the greedy text does."""
    pairs = zip(ours.get("losses", ()), theirs.get("losses", ()), strict=False)
    for step, (a, b) in enumerate(pairs, 1):
        if not abs(a - b) <= NEAR[row.narrow] * abs(a):
            raise UserError(f"{name}: {engine} computes another loss at step {step}, {b:.6g} where "
                            f"ours is {a:.6g}: no race")  # fmt: skip
    a, b = (found.get("tokens", [])[:GREEDY] for found in (ours, theirs))
    if a != b:
        raise UserError(f"{name}: {engine} writes another text, {b} where ours is {a}: no race")


def machine() -> dict[str, Any]:
    """What measures: processor, cores, Python, version and commit, command, BLAS's pin."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line for line in lines if "model name" in line]
    commit = "no commit"
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no clone
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, check=True)
        commit = done.stdout.strip()
    return {
        "processor": models[0].partition(": ")[2] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "version": f"{__version__} ({commit})",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        PIN: os.environ.get(PIN, "not set"),
    }


# words


def markdown(report: Mapping[str, Any]) -> str:
    """All tables."""
    results = report["results"]
    lines = ["# CPU benchmark", "", *(f"- {k}: {v}" for k, v in report["machine"].items())]
    lines += [f"- rounds: {report['rounds']}", *_engines(results), "", HOW, ""]
    for unit, title in SECTIONS:
        if chosen := [result for result in results if result["unit"] == unit]:
            lines += [f"## {title}", "", *_speeds(chosen), ""]
    for section in (_notes, _works, _without_pin, _shares):
        if found := list(section(results)):
            lines += [*found, ""]
    return "\n".join(lines).rstrip() + "\n"


def _engines(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each engine's own line, as often as it says different things."""
    said: dict[str, str] = {}
    for result in results:
        for name, found in {"ours": result, **result["peers"]}.items():
            if "engine" in found:
                said.setdefault(f"{name}: {found['engine']}", result["row"])
    yield from (f"- {line} (from {row} on)" for line, row in said.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; all columns but the first to the right."""
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    return [_line(head), f"|{rule}|", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _speeds(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ours beside every peer measured in one of these rows."""
    peers = list(dict.fromkeys(peer for result in results for peer in result["peers"]))
    better = "ours / {0}" if results[0]["unit"].endswith("/s") else "{0} / ours"
    head = ["", "parameters", "ours"]
    head += [cell for peer in peers for cell in (peer, better.format(peer))]
    rows = []
    for result in results:
        cells = [f"{result['title']} (`{result['row']}`)", f"{result['params']:,}", _cell(result)]
        for peer in peers:
            found = result["peers"].get(peer, {})
            cells += [_cell(found), f"{found['ratio']:.2f}" if "ratio" in found else ""]
        rows.append(cells)
    return _table(head, rows)


def _cell(found: Mapping[str, Any]) -> str:
    """A figure, or that there is none."""
    if "refused" in found:
        return "no, see below"
    return f"{found['value']:,.0f}" if found.get("value", 0) >= 1000 else (
        f"{found['value']:.3g}" if "value" in found else "")  # fmt: skip


def _notes(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the figures do not say."""
    for result in results:
        if "refused" in result:
            yield f"- {result['row']}: not on this CPU: {result['refused']}"
        for name, found in {"ours": result, **result["peers"]}.items():
            if "refused" in found and name != "ours":
                yield f"- {result['row']}: {name} failed: {found['refused']}"
            if "loss" in found:
                steps = f"mean of the last {MEAN} of {found['steps']:,} steps"
                yield f"- {result['row']}: {name} ends at {found['loss']:.4f}, {steps}"
            if "again" in found:
                again = f"the same again, kernels compiled: {found['again']:.3g} s"
                yield f"- {result['row']}: {found['runs']} whole runs; {again}"


def _works(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """FLOPs and rates of ours, positions of all."""
    rows = []
    for result in results:
        if "flops" not in result:
            continue
        at = {"ours": result, **result["peers"]}
        positions = [f"{n} {x['positions']:,.4g}" for n, x in at.items() if "positions" in x]
        cores = f"{result['cores']:.2f}" if "cores" in result else ""
        rows.append([
            result["row"], f"{result['flops'] / 1e6:,.4g}", f"{result['gflops']:,.4g}",
            f"{result['sgemm_gflops']:,.4g}", f"{result['share_of_peak']:.0%}", cores,
            ", ".join(positions),
        ])  # fmt: skip
    if rows:
        head = ["", "MFLOP", "GFLOP/s", "sgemm", "of sgemm", "cores busy", "positions a step"]
        yield from ("## Work of ours, a step or a token", "", WORK, "", *_table(head, rows))


def _without_pin(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Ours where OpenBLAS chooses its kernels by itself."""
    rows = [
        [r["row"], r["unit"], _cell(r), _cell(r[UNPINNED]),
         *(f"{x['sgemm_gflops']:,.4g}" for x in (r, r[UNPINNED]))]
        for r in results if UNPINNED in r
    ]  # fmt: skip
    if rows:
        head = ["", "unit", "ours", "without", "sgemm, GFLOP/s", "without"]
        yield from (f"## Without {PIN}", "", *_table(head, rows))


def _shares(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where the time of ours goes."""
    lines = []
    for result in results:
        if "ops" in result:
            shares = [f"{name} {share:.0%}" for name, share in result["ops"].items()]
            lines.append(f"- {result['row']}: {', '.join(shares) or 'one call, not told apart'}")
    if lines:
        yield from ("## Share of each operation in the step", "", *lines)
