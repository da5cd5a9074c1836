"""Loss curves of one or several runs, drawn from their metrics.jsonl (extra `plot`: matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .metrics import FILE_NAME, read_metrics

TRAIN, VAL = "loss/train", "loss/val"
WINDOW = 0.02  # the smoothed curve averages over this part of a run's points


def plot_runs(runs: Sequence[Path], out: Path) -> Path:
    """Draw loss/train (light), its running mean and loss/val of every run into the picture `out`.

    `runs` are run folders, or metrics.jsonl files; the ending of `out` chooses the format, .png
    where it has none. Returns the path written.
    UserError when matplotlib is missing, a run has no loss yet, or `out` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            'plotting needs matplotlib, which is not installed: pip install "gpu_microgpt[plot]"'
        ) from error
    curves = {label: _curves(path) for label, path in _labels(runs).items()}
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    ranges = [_draw(axes, label, f"C{i}", *curves[label]) for i, label in enumerate(curves)]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    margin = 0.05 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)  # one wild step hides no curve
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(next(iter(curves)) if len(curves) == 1 else "Loss", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    out = out if out.suffix else out.with_suffix(".png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    except ValueError as error:  # matplotlib's word for an ending it does not know
        raise UserError(
            f"cannot write {out}: got the ending {out.suffix!r}, wanted .png"
        ) from error
    return out


def smooth(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The running mean of `values` (n,) over a centred window, cut off at both ends."""
    half = int(values.size * WINDOW / 2)
    window = np.ones(2 * half + 1)
    total = np.convolve(values, window)[half : half + values.size]
    count = np.convolve(np.ones(values.size), window)[half : half + values.size]
    return np.asarray(total / count)


def _labels(runs: Sequence[Path]) -> dict[str, Path]:
    """metrics.jsonl files by the names of their runs, or by the paths where names repeat."""
    files = [run if run.is_file() else run / FILE_NAME for run in runs]
    names = [file.resolve().parent.name for file in files]
    return {
        name if names.count(name) == 1 else str(file.parent): file
        for name, file in zip(names, files, strict=True)
    }


def _curves(path: Path) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Steps and finite values of loss/train and of loss/val. UserError when both are empty."""
    rows = read_metrics(path)
    curves = []
    for tag in (TRAIN, VAL):
        points = [(row["step"], row[tag]) for row in rows if row.get(tag) is not None]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        curves.append((steps, values))
    if not any(steps.size for steps, _ in curves):
        raise UserError(f"{path} has no {TRAIN} and no {VAL}; train some steps first")
    return curves


def _draw(axes: Any, label: str, colour: str, train: Any, val: Any) -> tuple[float, float]:
    """Draw one run; return the lowest and the highest loss worth showing."""
    shown = []
    steps, losses = train
    if steps.size:
        mean = smooth(losses)
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(
            steps, mean, color=colour, linewidth=1.6, label=f"{label}: training, {mean[-1]:.3f}"
        )
        shown += [mean, losses.min()]
    steps, losses = val
    if steps.size:
        name = f"{label}: held out, {losses[-1]:.3f}"
        axes.plot(steps, losses, "o--", color=colour, markersize=4, label=name)
        shown.append(losses)
    values = np.hstack(shown)
    return float(values.min()), float(values.max())
