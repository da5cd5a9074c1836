"""What every kernel takes on every architecture, and how many fit: docs/benchmarks/kernel_table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from .cache import KernelCache
from .catalog import CATALOG, Variant
from .compiler import Program, Resources, compiler_release, kernels_folder, resources
from .context import WARP, ceil_div
from .device import KNOWN

HEAD = """# What the kernels take

Compiled by NVRTC {release} for every architecture; nothing here was run on a GPU. A cell reads:
registers a thread / blocks a multiprocessor holds at once / share of the warps it has room for. The
last two are an estimate: CUDA's rules of allocation, applied to a typical launch. Shared memory is
in bytes a block, static + dynamic; where that is too large, launchers choose another kernel. Local
memory (spilled registers, stack): {local}.

GPUs they are reckoned for: {devices}.

Made by `python scripts/kernel_table.py`; all numbers are in [kernel_table.json](kernel_table.json).
"""
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Row:
    """A kernel in one form, on every architecture it is made for."""

    stem: str
    kernel: str
    constants: dict[str, int]
    dtype: str
    threads: int
    dynamic_shared: int
    arches: dict[str, Resources]

    @property
    def name(self) -> str:
        """The kernel, its constants and its precision."""
        constants = [f"{name}={number}" for name, number in self.constants.items()]
        return " ".join([self.kernel, *constants, SHORT[self.dtype]])

    def blocks(self, arch: str) -> int:
        """How many a multiprocessor holds at once; 0 where not even one can be launched."""
        device, used = KNOWN[arch], self.arches[arch]
        shared = used.static_shared + self.dynamic_shared
        if shared > device.shared_per_block:
            return 0
        return device.occupancy(self.threads, used.registers, shared)

    def warps(self, arch: str) -> int:
        """Warps a multiprocessor holds at once."""
        return self.blocks(arch) * ceil_div(self.threads, WARP)

    def share(self, arch: str) -> float:
        """Those warps as a share of what a multiprocessor has room for."""
        return self.warps(arch) * WARP / KNOWN[arch].threads_per_multiprocessor

    def local(self, arch: str) -> int:
        """Bytes a thread keeps in memory for want of registers."""
        used = self.arches[arch]
        return used.stack + used.spill_stores + used.spill_loads


def programs(variant: Variant, dtype: str) -> Iterator[Program]:
    """One entry of the catalog for each architecture that it is made for."""
    source = kernels_folder() / f"{variant.stem}.cu"
    numbers = {"REAL_BF16": int(dtype == "bfloat16"), **variant.constants}
    defines = [f"{name}={number}" for name, number in numbers.items()]
    for arch, device in KNOWN.items():
        if device.tensor_cores or not variant.tensor_cores:
            yield Program.read(source, arch, defines)


def rows(catalog: Sequence[Variant], cache: KernelCache) -> list[Row]:
    """Compile all that the catalog names, several at once, and see what it takes.

    Raises BackendError where a program does not compile, ValueError where it has other kernels.
    """
    forms = [(variant, dtype) for variant in catalog for dtype in variant.dtypes]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = [
            {p.arch: pool.submit(_compile, v, p, cache) for p in programs(v, dtype)}
            for v, dtype in forms
        ]
        used = [{arch: job.result() for arch, job in part.items()} for part in jobs]
    return [
        Row(
            variant.stem, kernel, variant.constants, dtype, launch.threads, launch.shared,
            {arch: kernels[kernel] for arch, kernels in by_arch.items()},
        )
        for (variant, dtype), by_arch in zip(forms, used, strict=True)
        for kernel, launch in variant.kernels.items()
    ]  # fmt: skip


def markdown(table: Sequence[Row], release: str) -> str:
    """A table for each kernel file, a row a kernel in one form."""
    spilled = [f"{row.name} on {arch}" for row in table for arch in row.arches if row.local(arch)]
    devices = ", ".join(f"{arch} {device.name}" for arch, device in KNOWN.items())
    lines = [HEAD.format(release=release, local=", ".join(spilled) or "none", devices=devices)]
    for stem, group in groupby(table, lambda row: row.stem):
        lines += [f"## {stem}.cu\n", f"| kernel | threads | shared | {' | '.join(KNOWN)} |"]
        lines += ["|---|" + "---:|" * (2 + len(KNOWN))]
        lines += [f"| {' | '.join(_cells(row))} |" for row in group] + [""]
    return "\n".join(lines)


def write(folder: Path, cache: KernelCache) -> list[Path]:
    """Write kernel_table.md and kernel_table.json, and say where.

    Raises BackendError where the kernels do not compile.
    """
    table, release = rows(CATALOG, cache), compiler_release()
    paths = [folder / "kernel_table.md", folder / "kernel_table.json"]
    folder.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(markdown(table, release), "utf-8")
    paths[1].write_text(to_json(table, release), "utf-8")
    return paths


def to_json(table: Sequence[Row], release: str) -> str:
    """All numbers of the table, a line a row."""
    lines = ",\n".join(json.dumps(_record(row), separators=(",", ":")) for row in table)
    return f'{{"nvrtc": "{release}", "rows": [\n{lines}\n]}}\n'


def from_json(text: str) -> list[Row]:
    """The rows that `to_json` wrote."""
    records = json.loads(text)["rows"]
    names = [field.name for field in fields(Resources)]
    for record in records:
        found = record["arches"].items()
        record["arches"] = {a: Resources(*(used[name] for name in names)) for a, used in found}
    return [Row(**record) for record in records]


def _compile(variant: Variant, program: Program, cache: KernelCache) -> dict[str, Resources]:
    """What the kernels of a program take: those, and only those, the catalog names."""
    found = resources(cache.compiled(program).log)
    if set(found) != set(variant.kernels):
        raise ValueError(
            f"{program}: got kernels {sorted(found)}, wanted {sorted(variant.kernels)}"
        )
    return found


def _cells(row: Row) -> Iterator[str]:
    static = max(used.static_shared for used in row.arches.values())
    yield from (f"`{row.name}`", str(row.threads), f"{static} + {row.dynamic_shared}")
    for arch in KNOWN:
        if arch in row.arches:
            registers, blocks = row.arches[arch].registers, row.blocks(arch)
            held = f"{blocks} / {row.share(arch):.0%}" if blocks else "too large"
            yield f"{registers} / {held}"
        else:
            yield ""


def _record(row: Row) -> dict[str, Any]:
    record = asdict(row)
    for arch, numbers in record["arches"].items():
        numbers |= {"blocks": row.blocks(arch), "warps": row.warps(arch)}
    return record
