"""What a run records of itself: TensorBoard event files, and metrics.jsonl beside them.

Every record reaches the operating system at once, so a SIGKILL loses none. On resume whatever the
checkpoint does not know of is cut away, and what it knows of is not written again: no step is there
twice or missing, provided that all records of a step are written, and `flush` called, before its
checkpoint is saved.
"""

from __future__ import annotations

import io
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_STRING
from tensorboard.plugins.histogram import metadata as histogram_plugin
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_plugin
from tensorboard.plugins.image import metadata as image_plugin
from tensorboard.plugins.text import metadata as text_plugin

from .errors import UserError
from .event_files import AppendFile, EventFile, cut_event_files, event_files, replace
from .settings import flatten

FILE_NAME = "metrics.jsonl"
BUCKETS = 32  # of each kind: equally wide, and equally full


class Metrics:
    """Writes the metrics of one run; use it as a context manager, or call `close`."""

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_step: int | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        """Begin a run (`resume_step` None) or go on with it after `resume_step` (-1: over again).

        Entries after `resume_step` are removed; torn or altered ones too, each file with such
        damage being named through `warn`. UserError when the folder cannot be written, or when a
        run is to begin where one has been.
        """
        self._json_last: dict[str, int] = {}  # tag -> its last step kept from earlier sessions
        self._event_last: dict[str, int] = {}
        self._has_hparams = False
        path = run_dir / FILE_NAME
        if resume_step is None and (path.exists() or event_files(run_dir)):
            raise UserError(
                f"{run_dir} already holds the metrics of a run; go on with it (resume=auto), "
                f"choose another run.name, or remove the folder"
            )
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {run_dir}: {error.strerror}") from error
        if resume_step is not None:
            self._json_last = _cut_json(path, resume_step, warn)
            self._event_last = cut_event_files(run_dir, resume_step, warn)
        self._json = AppendFile(path)
        self._events = EventFile(run_dir)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`: one line of metrics.jsonl, and float32 points for TensorBoard.

        JSON has no NaN and no infinity: they are `null` in metrics.jsonl, kept in TensorBoard.
        """
        line = {tag: float(v) for tag, v in values.items() if step > self._json_last.get(tag, -1)}
        if line:
            finite = {tag: v if math.isfinite(v) else None for tag, v in line.items()}
            self._json.write(json.dumps({"step": step, **finite}).encode() + b"\n")
        points = [Summary.Value(tag=tag, simple_value=float(v)) for tag, v in values.items()]
        self._add(step, *points)

    def text(self, step: int, tag: str, text: str) -> None:
        """Record `text`, to be shown as it stands, not as Markdown."""
        verbatim = "\n".join("    " + line for line in text.split("\n"))  # Markdown's code block
        self._add_tensor(step, tag, text_plugin, _strings([], verbatim.encode()))

    def histogram(self, step: int, tag: str, values: np.ndarray[Any, Any]) -> None:
        """Record the distribution of `values`, any shape and real dtype.

        NaN and infinite ones are counted in the scalar `TAG/nonfinite`, written when there are any.
        """
        finite = values[np.isfinite(values)]
        buckets = histogram_buckets(finite)
        tensor = TensorProto(
            dtype=DT_DOUBLE, tensor_shape=_shape(buckets.shape), tensor_content=buckets.tobytes()
        )
        self._add_tensor(step, tag, histogram_plugin, tensor)
        if finite.size < values.size:
            self.scalars(step, {f"{tag}/nonfinite": values.size - finite.size})

    def image(self, step: int, tag: str, pixels: np.ndarray[Any, Any]) -> None:
        """Record a picture: uint8 (H, W) grey or (H, W, 3) RGB, not empty; else ValueError."""
        fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
        if pixels.dtype != np.uint8 or not fits or pixels.size == 0:
            raise ValueError(
                f"image {tag}: got {pixels.dtype} {pixels.shape}, wanted uint8 (H, W) or (H, W, 3)"
            )
        from PIL import Image  # here: the first picture comes long after the first step

        png = io.BytesIO()
        Image.fromarray(pixels).save(png, format="PNG")
        size = [str(pixels.shape[1]).encode(), str(pixels.shape[0]).encode()]  # width, height
        self._add_tensor(step, tag, image_plugin, _strings([3], *size, png.getvalue()))

    def hparams(self, config: Mapping[str, Any], metric_tags: Sequence[str]) -> None:
        """Describe this session for TensorBoard's HParams tab; call it once in every session.

        Nested settings become `a.b`, lists text; one that is None has no type and so no column.
        """
        settings = {
            name: json.dumps(value) if isinstance(value, list | tuple) else value
            for name, value in flatten(config).items()
            if value is not None
        }
        infos = [api_pb2.HParamInfo(name=name, type=_kind(v)[0]) for name, v in settings.items()]
        metrics = [
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=tag)
            for tag in metric_tags
        ]
        experiment = api_pb2.Experiment(
            hparam_infos=infos, metric_infos=metrics, time_created_secs=time.time()
        )
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in settings.items():
            setattr(start.hparams[name], _kind(value)[1], value)
        self._add_hparams(hparams_plugin.EXPERIMENT_TAG, experiment=experiment)
        self._add_hparams(hparams_plugin.SESSION_START_INFO_TAG, session_start_info=start)
        self._has_hparams = True

    def flush(self) -> None:
        """Wait until everything recorded is on the disk; call it before saving a checkpoint."""
        self._json.sync()
        self._events.sync()

    def close(self, *, success: bool = True) -> None:
        """End the session, as a success or a failure, and close the files; again is harmless."""
        try:
            if self._has_hparams:
                self._has_hparams = False
                status = api_pb2.STATUS_SUCCESS if success else api_pb2.STATUS_FAILURE
                end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
                self._add_hparams(hparams_plugin.SESSION_END_INFO_TAG, session_end_info=end)
        finally:
            self._json.close()
            self._events.close()

    def __enter__(self) -> Metrics:
        """Nothing is done."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close: a success unless an exception passes."""
        self.close(success=kind is None)

    def _add(self, step: int, *values: Any) -> None:
        new = [value for value in values if step > self._event_last.get(value.tag, -1)]
        if new:
            self._events.add(step, *new)

    def _add_tensor(self, step: int, tag: str, plugin: Any, tensor: Any) -> None:
        metadata = plugin.create_summary_metadata(display_name=None, description=None)
        self._add(step, Summary.Value(tag=tag, metadata=metadata, tensor=tensor))

    def _add_hparams(self, tag: str, **data: Any) -> None:
        content = plugin_data_pb2.HParamsPluginData(**data)
        metadata = hparams_plugin.create_summary_metadata(content)
        self._add(0, Summary.Value(tag=tag, metadata=metadata, tensor=hparams_plugin.NULL_TENSOR))


def histogram_buckets(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bucket finite `values` (any shape): float64 (k, 3), rows left edge, right edge, count.

    The edges are those of equally wide and of equally full buckets together: the tails of a
    gradient stretch far, and equally wide buckets alone would show its bulk as one block.
    k < 2 BUCKETS; no values give k = 0, equal ones a single bucket of no width. A bucket holds its
    left edge; the last one both.
    """
    ordered = np.sort(values, axis=None).astype(np.float64)
    if ordered.size == 0:
        return np.zeros((0, 3))
    low, high = ordered[0], ordered[-1]
    if low == high:
        return np.array([[low, high, ordered.size]])
    full = ordered[np.linspace(0, ordered.size - 1, BUCKETS + 1).astype(np.int64)]
    edges = np.unique(np.concatenate([np.linspace(low, high, BUCKETS + 1), full]))
    starts = np.searchsorted(ordered, edges)
    starts[-1] = ordered.size
    return np.stack([edges[:-1], edges[1:], np.diff(starts)], axis=1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order, as `{"step": int, tag: float or None, ...}`.

    A last line still being written is left out. UserError when the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return [row for _, row in _rows(data)]


def _rows(data: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # torn or altered
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield line + b"\n", row


def _cut_json(path: Path, last_step: int, warn: Callable[[str], None]) -> dict[str, int]:
    """Drop the lines after `last_step` and the damaged ones; return each tag's last step."""
    data = path.read_bytes() if path.exists() else b""
    rows = list(_rows(data))
    damaged = sum(1 for line in data.split(b"\n") if line) - len(rows)
    if damaged:
        warn(f"{path}: {damaged} line(s) are no metrics (an interrupted write?); dropped")
    kept = [(line, row) for line, row in rows if row["step"] <= last_step]
    replace(path, data, b"".join(line for line, _ in kept))
    return {tag: row["step"] for _, row in kept for tag in row if tag != "step"}


def _kind(value: Any) -> tuple[Any, str]:
    """A setting's type in the hparams plugin, and the protobuf field for it. TypeError for none."""
    if isinstance(value, bool):  # before int, which it is as well
        return api_pb2.DATA_TYPE_BOOL, "bool_value"
    if isinstance(value, int | float):
        return api_pb2.DATA_TYPE_FLOAT64, "number_value"
    if isinstance(value, str):
        return api_pb2.DATA_TYPE_STRING, "string_value"
    raise TypeError(f"a setting must be bool, int, float, str or a list, got {value!r}")


def _shape(sizes: Iterable[int]) -> Any:
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in sizes])


def _strings(shape: Sequence[int], *values: bytes) -> Any:
    return TensorProto(dtype=DT_STRING, tensor_shape=_shape(shape), string_val=values)
