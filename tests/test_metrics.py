from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpu_microgpt import event_files
from gpu_microgpt.errors import UserError
from gpu_microgpt.metrics import BUCKETS, Metrics, histogram_buckets, read_metrics

REPO = Path(__file__).parents[1]


def record(metrics: Metrics, first: int, last: int) -> None:
    """What a trainer writes: losses every step, an evaluation and a sample every fifth."""
    metrics.text(0, "config", "seed: 1337")
    metrics.hparams({"seed": 1337}, ["loss/val"])
    for step in range(first, last + 1):
        metrics.scalars(step, {"loss/train": 3.0 - step / 100, "lr": 1e-3})
        if step % 5 == 0:
            metrics.scalars(step, {"loss/val": 3.5})
            metrics.text(step, "samples", f"sample {step}")
            metrics.histogram(step, "weights/wte", np.arange(10.0))


def points(run_dir: Path) -> Counter[tuple[str, int]]:
    """How often each (tag, step) stands in the raw event files."""
    return Counter(
        (value.tag, event.step)
        for path in event_files.event_files(run_dir)
        for event in event_files.read_events(path)
        for value in event.summary.value
    )


def wanted(last: int) -> Counter[tuple[str, int]]:
    steps = [(tag, step) for step in range(1, last + 1) for tag in ("loss/train", "lr")]
    fifth = ("loss/val", "samples", "weights/wte")
    steps += [(tag, step) for step in range(5, last + 1, 5) for tag in fifth]
    return Counter([("config", 0), *((tag, 0) for tag in event_files.HPARAMS_TAGS), *steps])


def lines(run_dir: Path) -> Counter[tuple[str, int]]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return Counter((tag, row["step"]) for row in rows for tag in row if tag != "step")


def check(run_dir: Path, last: int) -> None:
    """No point of a run of `last` steps is missing or doubled, in either kind of file."""
    assert points(run_dir) == wanted(last)
    for path in event_files.event_files(run_dir):
        assert event_files.read_events(path)[0].file_version == "brain.Event:2"
    scalars = {"loss/train", "lr", "loss/val"}
    assert lines(run_dir) == Counter({k: n for k, n in wanted(last).items() if k[0] in scalars})


def begin(run_dir: Path, last: int) -> Path:
    with Metrics(run_dir) as metrics:
        record(metrics, 1, last)
    return event_files.event_files(run_dir)[-1]


def test_lines_are_json_with_the_tags_as_given(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.scalars(10, {"loss/train": 2.9, "lr": np.float32(0.5)})
        metrics.scalars(11, {"loss/train": float("nan"), "lr": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.splitlines()[0] == '{"step": 10, "loss/train": 2.9, "lr": 0.5}'
    strict: Callable[[str], object] = lambda name: pytest.fail(f"{name} is no JSON")  # noqa: E731
    last = json.loads(text.splitlines()[1], parse_constant=strict)
    assert last == {"step": 11, "loss/train": None, "lr": None}
    values = event_files.read_events(event_files.event_files(tmp_path)[0])[-1].summary.value
    assert np.isnan(values[0].simple_value)
    assert np.isposinf(values[1].simple_value)


@pytest.mark.parametrize("resume_step", [-1, 0, 4, 5, 12, 17, 40])
def test_resume_leaves_no_step_doubled_or_missing(tmp_path: Path, resume_step: int) -> None:
    begin(tmp_path, 17)
    with Metrics(tmp_path, resume_step=resume_step, warn=pytest.fail) as metrics:
        record(metrics, min(resume_step, 17) + 1 if resume_step > 0 else 1, 23)
    check(tmp_path, 23)
    assert not list(tmp_path.glob(".*"))  # no temporary is left


def test_resume_twice_and_write_the_resumed_step_again(tmp_path: Path) -> None:
    begin(tmp_path, 17)
    for resume_step, last in ((10, 14), (10, 20), (15, 22)):
        with Metrics(tmp_path, resume_step=resume_step) as metrics:
            record(metrics, resume_step - 3, last)  # steps that the checkpoint knows of: ignored
    check(tmp_path, 22)
    stamps = [int(p.name.split(".")[3]) for p in event_files.event_files(tmp_path)]
    assert stamps == sorted(set(stamps))  # TensorBoard reads the sessions in their order
    assert len(stamps) == 4


def test_resume_in_a_new_folder_writes_everything(tmp_path: Path) -> None:
    with Metrics(tmp_path / "new", resume_step=7) as metrics:
        record(metrics, 8, 9)
    assert points(tmp_path / "new")["config", 0] == 1
    assert points(tmp_path / "new")["loss/train", 8] == 1


def test_every_torn_end_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    events = begin(tmp_path, 5)
    whole, text = events.read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    ends = np.cumsum([len(r) for r in event_files.split_records(whole)[0]])
    for cut in (*range(1, 40), 333):
        assert len(whole) - cut not in ends  # inside a record
        events.write_bytes(whole[:-cut])
        (tmp_path / "metrics.jsonl").write_bytes(text[:-3])  # inside the last line
        warnings: list[str] = []
        Metrics(tmp_path, resume_step=5, warn=warnings.append).close()
        assert [str(events) in w or "metrics.jsonl: 1 line" in w for w in warnings] == [True, True]
        kept = int(np.sum(ends <= len(whole) - cut))
        originals = event_files.split_records(whole)[0][:kept]
        hparams = [tag.encode() for tag in event_files.HPARAMS_TAGS]
        assert events.read_bytes() == b"".join(
            r for r in originals if not any(tag in r for tag in hparams)
        )
        assert (tmp_path / "metrics.jsonl").read_bytes() == text[: text[:-1].rindex(b"\n") + 1]
        for new in event_files.event_files(tmp_path)[1:]:
            new.unlink()


def test_an_altered_record_is_dropped_alone(tmp_path: Path) -> None:
    events = begin(tmp_path, 6)
    data = bytearray(events.read_bytes())
    data[data.index(b"sample 5")] ^= 1
    events.write_bytes(data)
    rows = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([rows[0], b"\0" * 30, b"7", *rows[1:]]))
    warnings: list[str] = []
    Metrics(tmp_path, resume_step=6, warn=warnings.append).close()
    assert len(warnings) == 2
    assert "2 line(s)" in warnings[0]
    hparams = Counter((tag, 0) for tag in event_files.HPARAMS_TAGS)
    assert points(tmp_path) == wanted(6) - hparams - Counter([("samples", 5)])
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join(rows)


def test_a_failed_cut_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = begin(tmp_path, 6)
    before = events.read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left"):
            Metrics(tmp_path, resume_step=3)
    assert (events.read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()) == before
    assert not list(tmp_path.glob(".*"))


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, 3)
    with pytest.raises(UserError, match="already holds the metrics of a run"):
        Metrics(tmp_path)
    with pytest.raises(UserError, match="cannot make the run folder"):
        Metrics(tmp_path / "metrics.jsonl" / "run")


def run_python(script: str, *arguments: object, path: Path = REPO) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{REPO}"},
        timeout=120,
    )


WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from gpu_microgpt.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]))
for step in range(1, 101):
    metrics.scalars(step, {"loss": float(step)})
if sys.argv[2] == "flush":
    metrics.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("last_act", ["flush", "nothing"])
def test_a_killed_process_loses_nothing(tmp_path: Path, last_act: str) -> None:
    assert run_python(WRITE_AND_DIE, tmp_path, last_act).returncode == -9
    expected = Counter({("loss", step): 1 for step in range(1, 101)})
    assert points(tmp_path) == expected
    assert lines(tmp_path) == expected


def test_flush_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = set()
    with Metrics(tmp_path) as metrics:
        monkeypatch.setattr(os, "fsync", lambda fd: synced.add(os.fstat(fd).st_ino))
        metrics.flush()
    assert synced == {path.stat().st_ino for path in tmp_path.iterdir()}


FILL_THE_DISK = """
import resource, sys
from pathlib import Path
from gpu_microgpt.errors import UserError
from gpu_microgpt.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # bytes a file may have
try:
    for step in range(1, 1001):
        metrics.scalars(step, {"a/tag/of/some/length": 1.0})
except UserError as error:
    print(error)
metrics.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_full_disk_is_one_clear_line_and_leaves_whole_records(tmp_path: Path) -> None:
    result = run_python(FILL_THE_DISK, tmp_path)
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    assert result.stdout.startswith(f"cannot write {tmp_path}")
    (events,) = event_files.event_files(tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert 9_900 < max(sizes.values()) < 10_000
    assert event_files.split_records(events.read_bytes())[1] == 0
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_no_framework_is_imported_even_where_there_is_one(tmp_path: Path) -> None:
    for name in ("tensorflow", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    script = (
        "import sys, numpy as np\nfrom pathlib import Path\n"
        "from gpu_microgpt.metrics import Metrics\n"
        "with Metrics(Path(sys.argv[1])) as m:\n"
        "    m.hparams({'a': 1}, []); m.text(0, 'a', 'b'); m.histogram(0, 'h', np.ones(3))\n"
        "    m.image(0, 'i', np.zeros((2, 2), np.uint8)); m.scalars(0, {'s': 1})\n"
    )
    result = run_python(script, tmp_path / "run", path=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("shape", [(1000,), (7, 13), (2, 3, 5), (2,)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_buckets_hold_every_value_once(shape: tuple[int, ...], dtype: type) -> None:
    values = np.random.default_rng(0).standard_t(1.5, size=shape).astype(dtype)  # heavy tails
    buckets = histogram_buckets(values)
    left, right, count = buckets.T
    assert buckets.dtype == np.float64
    assert len(buckets) < 2 * BUCKETS
    np.testing.assert_array_equal(left[1:], right[:-1])
    assert np.all(left < right)
    assert (left[0], right[-1]) == (values.min(), values.max())
    for low, high, n in buckets[:-1]:
        assert n == np.sum((values >= low) & (values < high))
    assert count[-1] == np.sum(values >= left[-1])
    assert count.max() <= max(2, 2 * values.size / BUCKETS)  # an outlier does not hide the bulk


def test_buckets_of_special_arrays() -> None:
    assert histogram_buckets(np.zeros((0, 3), np.float32)).shape == (0, 3)
    np.testing.assert_array_equal(histogram_buckets(np.full((4, 2), 0.5)), [[0.5, 0.5, 8]])
    spike = np.concatenate([np.zeros(900), np.linspace(-1, 1, 100)])  # unused rows' gradients
    assert histogram_buckets(spike)[:, 2].sum() == 1000
    assert histogram_buckets(spike)[:, 2].max() >= 900


def test_values_that_are_not_finite_are_counted_apart(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.histogram(3, "g", np.array([[1.0, np.nan], [np.inf, 2.0]], np.float32))
        metrics.histogram(4, "g", np.full(5, np.nan))
        metrics.histogram(5, "g", np.ones(5))
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 3, "g/nonfinite": 2.0},
        {"step": 4, "g/nonfinite": 5.0},
    ]
    assert points(tmp_path)["g", 4] == 1


def test_pictures_carry_width_then_height(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.image(1, "picture", np.zeros((4, 6), np.uint8))
    (path,) = event_files.event_files(tmp_path)
    width, height, png = event_files.read_events(path)[-1].summary.value[0].tensor.string_val
    assert (width, height) == (b"6", b"4")
    assert Image.open(io.BytesIO(png)).size == (6, 4)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4)),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4), "u1"),
    ],
)
def test_wrong_pictures_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    with Metrics(tmp_path) as metrics, pytest.raises(ValueError, match="wanted uint8"):
        metrics.image(1, "picture", pixels)


def test_settings_without_a_type_are_refused(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics, pytest.raises(TypeError, match="a setting must be"):
        metrics.hparams({"model": {"init": object()}}, [])


def test_a_missing_metrics_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*gone"):
        read_metrics(tmp_path / "gone")
