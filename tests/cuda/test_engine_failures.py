"""A lost device or too little memory is one line, and leaves the last checkpoint good."""

from __future__ import annotations

import pytest

from gpu_microgpt import cli, memory_plan
from gpu_microgpt.backend import Backend
from gpu_microgpt.config import Config
from gpu_microgpt.dims import Dims
from gpu_microgpt.errors import BackendError, DeviceError
from gpu_microgpt.trainer import Trainer
from tests.cuda.engine_cases import CUPY, EVERY_STEP, dataset_of
from tests.cuda.stand_in import install
from tests.run_helpers import QUIET, saved, settings


@pytest.mark.parametrize("late", [False, True])
def test_a_lost_device_leaves_the_last_checkpoint_good(late, monkeypatch, tmp_path):
    opened = install(monkeypatch, guarded=False, late=late)
    config = settings(tmp_path, *CUPY, *QUIET)
    trainer, save = Trainer(config), Trainer._save

    def save_and_pull_the_plug(self: Trainer, step: int) -> None:
        save(self, step)
        opened[0].fail_after(3)

    monkeypatch.setattr(Trainer, "_save", save_and_pull_the_plug)
    with pytest.raises(DeviceError) as failure:
        trainer.run()
    line = str(failure.value)
    assert "is lost" in line
    assert "the checkpoint of step 5 is kept" in line
    assert "resume=auto" in line
    assert "lr=LOWER" not in line
    assert "\n" not in line
    monkeypatch.undo()
    install(monkeypatch, guarded=False)
    assert Trainer(settings(tmp_path, *CUPY, *QUIET, "resume=auto")).run() == 0
    assert 5 in saved(config.run.path)


def test_a_plan_too_large_names_the_batch_that_fits(monkeypatch, tmp_path):
    install(monkeypatch, memory_bytes=36 << 20)
    config = settings(tmp_path, *CUPY, "train.batch_size=1000", "model.block_size=64")
    with pytest.raises(BackendError, match=r"lower train.batch_size to \d+ ") as failure:
        Trainer(config).run()
    fits = int(str(failure.value).split("lower train.batch_size to ")[1].split()[0])
    assert 1 < fits < 1000
    smaller = settings(tmp_path, *CUPY, *EVERY_STEP, "model.block_size=64", "train.steps=1")
    assert Trainer(Config.from_dict(smaller.to_dict(), [f"train.batch_size={fits}"])).run() == 0


def test_the_plan_of_a_run_has_all_its_text(stand_ins, monkeypatch, tmp_path):
    """What is trained on and what is held out lie on the GPU both."""
    texts, check = [], memory_plan.check

    def noted(config: Config, dims: Dims, backend: Backend, text: int) -> str:
        texts.append(text)
        return check(config, dims, backend, text)

    monkeypatch.setattr("gpu_microgpt.memory_plan.check", noted)
    config = settings(tmp_path, *CUPY, *EVERY_STEP, "train.steps=1")
    assert Trainer(config).run() == 0
    dataset = dataset_of(config)
    assert dataset.val is not None
    assert texts == [dataset.train.nbytes + dataset.val.nbytes]


def test_memory_that_runs_out_all_the_same_is_one_line(monkeypatch, tmp_path, capsys):
    """Others may take what was free when it was planned."""
    install(monkeypatch, memory_bytes=(32 << 20) + 20_000)
    monkeypatch.setattr("gpu_microgpt.memory_plan.check", lambda *args: "memory: enough")
    (tmp_path / "run.yaml").write_text(settings(tmp_path, *CUPY).to_yaml())
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert "out of memory" in line
    assert "lower train.batch_size" in line
