"""Killed at any instant, or refused by the disk at any call: no checkpoint is ever lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpu_microgpt import checkpoint
from gpu_microgpt.checkpoint import OPTIMIZER, STATE, WEIGHTS
from gpu_microgpt.errors import CheckpointError
from tests.checkpoint_helpers import assert_same, make_state, names, no_warning, one_line

CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")
AGAIN, NEXT = 3, 4  # the step to save after 1 (the best), 2 and 3
Call = tuple[str, str, str]  # call, name of the file or folder, new name
Failure = Callable[[int, str], BaseException | None]  # of the n-th call


class KilledError(BaseException):
    """Stands for SIGKILL: no `except OSError` catches it."""


class Disk:
    """Records the calls that change a disk, and makes some of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Call] = []
        self.fail: Failure = lambda index, call: None
        self._open_files: dict[int, str] = {}
        for call in CALLS:
            monkeypatch.setattr(os, call, self._wrap(call, getattr(os, call)))

    def _wrap(self, call: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            first = self._open_files.get(args[0], "") if isinstance(args[0], int) else args[0]
            second = args[1] if call == "rename" else ""
            self.calls.append((call, Path(first).name, Path(second).name))
            failure = self.fail(len(self.calls) - 1, call)
            if failure is not None:
                if call == "write" and not isinstance(failure, OSError):
                    original(args[0], args[1][: len(args[1]) // 2])
                raise failure
            result = original(*args, **kwargs)
            if call == "open":
                self._open_files[result] = str(args[0])
            return result

        return wrapped


def killed(at: int) -> Failure:
    return lambda index, call: KilledError() if index >= at else None


def full(at: int, lasting: bool) -> Failure:
    """Full at one call, and if lasting, for all that takes up space from then on."""

    def fail(index: int, call: str) -> OSError | None:
        fails = index == at or (lasting and index > at and call in ("write", "fsync", "mkdir"))
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if fails else None

    return fail


@contextmanager
def disk() -> Iterator[Disk]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Disk(monkeypatch)


def prepare(folder: Path) -> None:
    for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0)):
        checkpoint.save(folder, make_state(step, loss), keep=2)


def save(folder: Path, step: int, seed: int) -> None:
    """Save `step` with the content of make_state(seed)."""
    state = make_state(seed, 2.5)
    state.step = step
    checkpoint.save(folder, state, keep=2)


def check_nothing_lost(folder: Path, step: int) -> None:
    """Before or after, nothing between; and the next save works and clears up."""
    found = checkpoint.newest(folder, no_warning)
    wanted = make_state(3, 2.0) if found.meta["val_loss"] == 2.0 else make_state(99, 2.5)
    wanted.step = 3 if found.meta["val_loss"] == 2.0 else step
    assert_same(found, wanted)
    assert_same(checkpoint.best(folder, no_warning), make_state(1, 1.0))
    save(folder, step, seed=50)
    assert names(folder) == [f"step-{s:08d}" for s in (1, step - 1, step)]
    for path in folder.iterdir():
        checkpoint.load(path)


def count_calls(folder: Path, step: int) -> int:
    prepare(folder)
    with disk() as recorder:
        save(folder, step, seed=99)
    assert recorder.calls
    return len(recorder.calls)


@pytest.mark.parametrize("step", [AGAIN, NEXT])
def test_killed_at_every_single_call(tmp_path: Path, step: int) -> None:
    for index in range(count_calls(tmp_path / "counted", step)):
        folder = tmp_path / str(index)
        prepare(folder)
        with disk() as recorder:
            recorder.fail = killed(index)
            with pytest.raises(KilledError):
                save(folder, step, seed=99)
        check_nothing_lost(folder, step)


@pytest.mark.parametrize("step", [AGAIN, NEXT])
def test_killed_again_while_clearing_up_after_a_kill(tmp_path: Path, step: int) -> None:
    calls = count_calls(tmp_path / "counted", step)
    for first in range(0, calls, 3):
        for second in range(0, calls, 4):
            folder = tmp_path / f"{first}-{second}"
            prepare(folder)
            for index in (first, second):
                with disk() as recorder:
                    recorder.fail = killed(index)
                    with pytest.raises(KilledError):
                        save(folder, step, seed=99)
            check_nothing_lost(folder, step)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("step", [AGAIN, NEXT])
def test_disk_full_at_every_single_call(tmp_path: Path, step: int, lasting: bool) -> None:
    for index in range(count_calls(tmp_path / "counted", step)):
        folder = tmp_path / str(index)
        prepare(folder)
        with disk() as recorder:
            recorder.fail = full(index, lasting)
            with pytest.raises(CheckpointError, match="No space left on device at ") as error:
                save(folder, step, seed=99)
        assert "bytes are wanted; free some space" in one_line(error)
        assert not (folder / f"step-{step:08d}.partial").exists()
        check_nothing_lost(folder, step)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_full_disk_names_file_and_bytes(tmp_path: Path, call: str) -> None:
    prepare(tmp_path)
    size = sum(p.stat().st_size for p in (tmp_path / "step-00000003").iterdir())
    with disk() as recorder:
        recorder.fail = lambda i, c: OSError(errno.ENOSPC, "Full") if c == call else None
        with pytest.raises(CheckpointError, match="step-00000004: Full at ") as error:
            checkpoint.save(tmp_path, make_state(4, 2.0), keep=2)
    assert f"step-00000004.partial/{WEIGHTS}; {size:,} bytes" in one_line(error)
    assert names(tmp_path) == [f"step-{s:08d}" for s in (1, 2, 3)]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    assert_same(checkpoint.load(checkpoint.save(tmp_path, make_state(1), keep=1)), make_state(1))


def test_flushed_then_renamed_then_flushed_then_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    with disk() as recorder:
        save(folder, 1, seed=1)
    flushed = [name for call, name, _ in recorder.calls if call == "fsync"]
    partial = "step-00000001.partial"
    assert flushed[:2] == [tmp_path.name, "run"]  # new folders are flushed into their parents
    assert flushed[2:] == [WEIGHTS, OPTIMIZER, STATE, partial, "checkpoints"]
    renamed = recorder.calls.index(("rename", partial, "step-00000001"))
    order = [recorder.calls.index(("fsync", name, "")) for name in flushed[2:]]
    assert order[:4] == sorted(order[:4])
    for name in (WEIGHTS, OPTIMIZER, STATE):
        writes = [i for i, c in enumerate(recorder.calls) if c == ("write", name, "")]
        assert writes
        assert writes[-1] < recorder.calls.index(("fsync", name, ""))
    assert order[3] < renamed < order[4]


@pytest.mark.parametrize("step", [AGAIN, NEXT])
def test_nothing_is_deleted_before_the_new_one_is_durable(tmp_path: Path, step: int) -> None:
    prepare(tmp_path)
    with disk() as recorder:
        save(tmp_path, step, seed=99)
    calls = recorder.calls
    renamed = calls.index(("rename", f"step-{step:08d}.partial", f"step-{step:08d}"))
    durable = calls.index(("fsync", tmp_path.name, ""), renamed)
    gone = [i for i, (call, _, _) in enumerate(calls) if call in ("unlink", "rmdir")]
    assert gone
    assert durable < min(gone)
    away = [i for i, c in enumerate(calls) if c[0] == "rename" and c[2].endswith(".partial")]
    assert all(durable < i for i in away)


def test_a_stand_in_stays_until_its_successor_is_durable(tmp_path: Path) -> None:
    prepare(tmp_path)
    with disk() as recorder:
        in_place = ("rename", "step-00000003.partial", "step-00000003")
        recorder.fail = lambda i, c: KilledError() if in_place in recorder.calls[:-1] else None
        with pytest.raises(KilledError):
            save(tmp_path, AGAIN, seed=99)
    assert {"step-00000003", "step-00000003.replaced"} <= set(names(tmp_path))
    with disk() as recorder:
        save(tmp_path, NEXT, seed=99)
    gone = [call for call, _, _ in recorder.calls].index("unlink")
    assert ("fsync", tmp_path.name, "") in recorder.calls[:gone]


def test_leftovers_of_killed_saves_are_cleared(tmp_path: Path) -> None:
    prepare(tmp_path)
    for name in ("step-00000002.partial", "step-00000009.partial", "step-00000003.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS).write_bytes(b"half")
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000002.replaced")
    (tmp_path / "notes").mkdir()
    assert checkpoint.saved_steps(tmp_path) == [3, 2, 1]
    assert checkpoint.find(tmp_path, "last", warn=no_warning).step == 3
    checkpoint.save(tmp_path, make_state(4), keep=3)
    assert names(tmp_path) == ["notes", *(f"step-{s:08d}" for s in (1, 2, 3, 4))]


def test_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount program: a full disk is only simulated")
    if mounted.returncode:
        pytest.skip(f"may not mount a small disk, only simulated: {mounted.stderr.strip()}")
    try:
        checkpoint.save(folder, make_state(1), keep=1)
        for step in (1, 2):
            with pytest.raises(CheckpointError, match="No space left on device at ") as error:
                checkpoint.save(folder, make_state(step, rows=20_000), keep=1)
            assert f"step-0000000{step}.partial/{OPTIMIZER}; 96" in one_line(error)
            assert names(folder) == ["step-00000001"]
            assert_same(checkpoint.newest(folder, no_warning), make_state(1))
        checkpoint.save(folder, make_state(2), keep=1)
        assert names(folder) == ["step-00000002"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_unwritable_folder(tmp_path: Path) -> None:
    prepare(tmp_path / "run")
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(path.stat().st_mode | 0o055)
    (tmp_path / "run").chmod(0o555)
    as_root = os.geteuid() == 0
    if as_root:
        os.seteuid(65534)  # permissions do not bind root
    try:
        for folder in (tmp_path / "run", tmp_path / "run" / "new"):
            with pytest.raises(CheckpointError, match=r"cannot save .*Permission denied") as error:
                checkpoint.save(folder, make_state(4), keep=1)
            assert "permissions or set run.dir to another folder" in one_line(error)
        with pytest.raises(CheckpointError, match=r"cannot delete .*Permission denied"):
            checkpoint.discard_after(tmp_path / "run", 1)
        assert checkpoint.newest(tmp_path / "run", no_warning).step == 3
    finally:
        if as_root:
            os.seteuid(0)
        (tmp_path / "run").chmod(0o755)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot save .*(File exists|Not a directory)"):
        checkpoint.save(tmp_path / "checkpoints", make_state(1), keep=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_sigkill_at_random_instants(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.checkpoint_crash_driver", str(tmp_path / "c"), "150"]
    driver = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # a forked process has one thread
        capture_output=True,
        text=True,
    )
    assert driver.returncode == 0, driver.stderr
    assert "150 kills" in driver.stdout
