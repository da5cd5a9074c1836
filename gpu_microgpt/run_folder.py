"""A run's folder: its settings, its checkpoints, and where a run goes on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .checkpoint import State, discard_after, find, newest, save, saved_steps
from .config import Config
from .data.corpus import Corpus
from .errors import ConfigError, DataError, UserError
from .settings import flatten

Log = Callable[[str], None]
MAY_DIFFER = (
    "resume", "run.", "train.stop_at", "threads", "backend", "kernels", "device", "profile",
    "sample.", "checkpoint.",
)  # fmt: skip


class RunFolder:
    """`config.yaml`, `metrics.jsonl`, event files, `checkpoints/` and `samples/` of one run."""

    def __init__(self, config: Config) -> None:
        """Name the paths; nothing is made yet."""
        self.config = config
        self.path = config.run.path
        self.checkpoints = self.path / "checkpoints"

    def start(self, log: Log) -> State | None:
        """Return the checkpoint to go on from, or None to begin.

        Raises ConfigError where a run would be overwritten or the model has another shape,
        CheckpointError where no checkpoint can be used.
        """
        steps, resume = saved_steps(self.checkpoints), self.config.resume
        if resume is None and steps:
            raise ConfigError(
                f"run.name: {self.path} holds a run at step {steps[0]}: add resume=auto to go on "
                "with it, or run.name=OTHER to begin another"
            )
        if resume is None:
            return None
        if resume == "auto" and not steps:
            log(f"resume: no checkpoint in {self.checkpoints.resolve()}, so this is a new run")
            return None
        if resume == "auto":
            state = newest(self.checkpoints, log)
        else:
            state = find(Path(resume), "last", warn=log)
            inside = Path(resume).resolve().is_relative_to(self.path.resolve())
            if steps and not inside:
                raise ConfigError(
                    f"resume: {self.path} holds another run; add run.name=OTHER to go on from "
                    f"{resume} in a new folder"
                )
        self._compare(state, log)
        return state

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other programs out of this folder, which is made where there is none.

        Raises ConfigError where another run is at work here.
        """
        held = FileLock(self.path / ".lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held.acquire()
        except Timeout:
            raise ConfigError(
                f"run.name: another program is training in {self.path}; wait for it, or choose "
                "another run.name"
            ) from None
        except OSError as failure:
            raise UserError(f"cannot write to {self.path}: {failure.strerror}") from None
        try:
            yield
        finally:
            held.release()

    def rewind(self, state: State, log: Log) -> None:
        """Leave no checkpoint from after `state`, and have one of it: it may be another folder's.

        Do this before the metrics are cut to that step: a crash in between loses nothing then.
        """
        for path in discard_after(self.checkpoints, state.step):
            log(f"removed {path}: later than the step this run goes on from")
        if state.step not in saved_steps(self.checkpoints):
            self.save(state)

    def settings(self, corpus: Mapping[str, str]) -> str:
        """The settings as YAML, and above them the corpus really used."""
        again = Config.from_dict(self.config.to_dict(), ["resume=null"])
        return f"# corpus: {corpus['name']}, sha256 {corpus['sha256']}\n{again.to_yaml()}"

    def write_settings(self, settings: str) -> Path:
        """Keep the settings, to go on with and to read."""
        return self._write("config.yaml", settings)

    def save(self, state: State) -> Path:
        """Write a checkpoint, durable on return."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        return save(self.checkpoints, state, self.config.checkpoint.keep)

    def write_sample(self, step: int, text: str) -> Path:
        """Keep sample texts of a step."""
        return self._write(f"samples/step-{step:08d}.txt", text + "\n")

    def write_profile(self, table: str, numbers: str) -> Path:
        """Keep where the time of this session's steps went, as Markdown and as JSON."""
        self._write("profile.json", numbers)
        return self._write("profile.md", table)

    def resume_command(self) -> str:
        """The command line that goes on from the newest checkpoint, up to the run's end."""
        further = ["train.stop_at=null"] if self.config.train.stop_at else []
        return command("train", self.path / "config.yaml", "resume=auto", *further)

    def places(self, finished: bool) -> str:
        """Where everything lies, and the commands that go on from here, as lines."""
        heat = ("--temperature", self.config.sample.temperature)
        lines = [
            f"run folder:    {self.path} (checkpoints, samples, metrics.jsonl)",
            f"curves:        {tensorboard_command(self.config.run.dir)}",
            f"write text:    {command('generate', self.path, *heat)}",
        ]
        return "\n".join(lines if finished else [f"go on with:    {self.resume_command()}", *lines])

    def _write(self, name: str, text: str) -> Path:
        """Write a text file whole or not at all. Raises UserError where the disk refuses."""
        path = self.path / name
        temporary = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError as failure:
            raise UserError(
                f"cannot write {path}: {failure.strerror}; free some space or check the folder's "
                "permissions, then resume"
            ) from None
        return path

    def _compare(self, state: State, log: Log) -> None:
        """Refuse another model's shape; say which other settings changed."""
        before, now = (flatten(c) for c in (state.meta["config"], self.config.to_dict()))
        changed = {k: (before.get(k), v) for k, v in now.items() if before.get(k) != v}
        for key in ("n_layer", "n_head", "n_embd", "block_size"):
            if f"model.{key}" in changed:
                was, got = changed[f"model.{key}"]
                raise ConfigError(
                    f"model.{key}: got {got}, but the checkpoint to resume has {was}; wanted the "
                    "same model: leave the setting or begin a new run"
                )
        splits = ["data.mode", "data.val_fraction"]
        splits += ["seed"] if self.config.data.mode == "documents" else []
        held = [key for key in splits if key in changed]
        if held and state.meta["corpus"]["requested"] == self.config.data.source:
            was, got = changed[held[0]]
            raise ConfigError(
                f"{held[0]}: got {got}, but the checkpoint to resume has {was}; wanted the same: "
                "held-out text would be trained on"
            )
        said = [
            f"{key} {was} -> {got}"
            for key, (was, got) in changed.items()
            if not key.startswith(MAY_DIFFER)
        ]
        if said:
            log("settings changed since the checkpoint: " + ", ".join(said))


def check_corpus(corpus: Corpus, saved: Mapping[str, Any], log: Log) -> None:
    """Compare with the corpus a checkpoint was trained on.

    Raises DataError where the same source now gives another text.
    """
    if corpus.sha256 == saved["sha256"]:
        return
    if corpus.requested == saved["requested"]:
        raise DataError(
            f"data.source: {corpus.requested} is no longer the text this run was trained on "
            f"(then {saved['name']}, sha256 {saved['sha256'][:12]}; now {corpus.name}, sha256 "
            f"{corpus.sha256[:12]}): restore that text, or begin a new run"
        )
    log(f"corpus changed since the checkpoint: {saved['name']} -> {corpus.name}")


def command(name: str, *arguments: object) -> str:
    """The command line a user would type for `name`, in the way this program was started."""
    script = Path(sys.argv[0]).with_name(f"{name}.py")
    from_clone = script.parent.name == "scripts" and script.is_file()
    start = [sys.orig_argv[0], str(script)] if from_clone else ["gpu-microgpt", name]
    return shlex.join([*start, *map(str, arguments)])


def tensorboard_command(folder: str) -> str:
    """The command line that shows the runs in `folder`, from the environment that is in use."""
    beside = Path(sys.orig_argv[0]).with_name("tensorboard")
    found = len(beside.parts) > 1 and beside.is_file()
    return shlex.join([str(beside) if found else "tensorboard", "--logdir", folder])
