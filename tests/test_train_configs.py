"""Every shipped settings file trains, without a network, and leaves the whole record."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import requests

from gpu_microgpt.checkpoint import find
from gpu_microgpt.config import Config, shipped
from gpu_microgpt.data.corpus import FOLDER_VARIABLE, load_corpus
from gpu_microgpt.event_files import event_files, read_events
from gpu_microgpt.text_model import load
from gpu_microgpt.trainer import Trainer
from tests.run_helpers import events, no_warning, rows, settings, text_event, train

OFFLINE = {"documents": "stdlib-words", "stream": "stdlib"}
SMALLER = {  # what a CPU cannot do in a second
    "baby_gpt": ["threads=1", "train.batch_size=1", "train.eval_batches=1", "sample.max_tokens=5"],
    "shakespeare": ["train.batch_size=2", "train.eval_batches=2", "sample.max_tokens=40"],
}
SCALARS = {"loss/train", "lr", "grad_norm", "tokens_per_second", "ms_per_step", "gflops"}
HELD_OUT = {"loss/val", "bits_per_char/val"}
HPARAMS = {f"_hparams_/{kind}" for kind in ("experiment", "session_start_info")}


def two_steps(name: str, folder: Path, *overrides: str) -> Path:
    """Train a shipped file's model for two steps with all there is to record at the second."""
    held_out = "train.eval_interval=2" if name != "microgpt" else "train.eval_interval=0"
    steps = ["train.steps=2", "train.log_interval=1", "train.histogram_interval=2", held_out]
    config = Config.load(name, [f"run.dir={folder}", *steps, *SMALLER.get(name, []), *overrides])
    assert Trainer(config).run() == 0
    return config.run.path


def all_tags(run: Path) -> set[str]:
    return {v.tag for f in event_files(run) for e in read_events(f) for v in e.summary.value}


def assert_recorded(run: Path, config: Config) -> None:
    """Every kind of record is there, and the model it leaves can write."""
    state = find(run, "last", warn=no_warning)
    assert state.step == 2
    held_out = HELD_OUT if config.data.val_fraction else set()
    kinds = {f"{kind}/{name}" for kind in ("weights", "gradients") for name in state.weights}
    pictures = {f"attention/layer{i}" for i in range(config.model.n_layer)}
    texts = {"config", "samples"}
    assert all_tags(run) >= SCALARS | held_out | kinds | pictures | texts | HPARAMS
    assert {step for tag, step in events(run) if tag == "loss/train"} == {1, 2}
    assert {tag for row in rows(run) for tag in row} == {
        "step", "loss/train", "lr", "grad_norm", *held_out,
    }  # fmt: skip
    assert (run / "samples" / "step-00000002.txt").stat().st_size > 1
    assert len(load(run, warn=no_warning).generate(max_tokens=3)) == 1


def test_the_files_are_all_there() -> None:
    assert {"baby_gpt", "microgpt", "names", "shakespeare"} <= shipped().keys()


@pytest.mark.parametrize("name", shipped())
def test_offline(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(requests, "get", None)  # nothing here may ask the network
    config = Config.load(name)
    source = OFFLINE[config.data.mode]
    run = two_steps(name, tmp_path, f"data.source={source}")
    assert_recorded(run, config)
    assert f"data: {source}, " in capsys.readouterr().out


@pytest.mark.skipif(not os.environ.get(FOLDER_VARIABLE), reason=f"{FOLDER_VARIABLE} is not set")
@pytest.mark.parametrize("name", shipped())
def test_on_its_own_data(name: str, tmp_path: Path) -> None:
    run = two_steps(name, tmp_path)
    config = Config.load(name)
    assert_recorded(run, config)
    corpus = find(run, "last", warn=no_warning).meta["corpus"]
    assert corpus["name"] == corpus["requested"] == config.data.source


@pytest.mark.parametrize("name", ["names", "shakespeare"])
def test_fallback_is_told_and_recorded(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the console, the run's settings, TensorBoard's text and the checkpoint."""
    break_network(monkeypatch, tmp_path)
    config = Config.load(name)
    used = OFFLINE[config.data.mode]
    run = two_steps(name, tmp_path)
    loud = [li for li in capsys.readouterr().out.splitlines() if li.startswith("WARNING: ")]
    assert len(loud) == 1
    assert f"fallback corpus {used!r}" in loud[0]
    expected = load_corpus(config.data.model_copy(update={"source": used}), log=no_warning)
    assert find(run, "last", warn=no_warning).meta["corpus"] == {
        "name": used, "requested": name, "sha256": expected.sha256,
    }  # fmt: skip
    for text in (text_event(run, "config"), (run / "config.yaml").read_text(encoding="utf-8")):
        lines = [line for line in text.splitlines() if "fallback:" not in line]
        assert used in " ".join(lines)
    assert Config.load(run / "config.yaml").data.source == name


def test_fallback_null_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_network(monkeypatch, tmp_path)
    with pytest.raises(Exception, match=r"names\.txt: cannot be reached"):
        two_steps("names", tmp_path, "data.fallback=null")
    assert not (tmp_path / "names").exists()


def break_network(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No file at hand, and every download fails at once."""

    def unreachable(*args: object, **options: object) -> None:
        raise requests.ConnectionError

    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setattr("gpu_microgpt.data.download.time.sleep", lambda seconds: None)


@pytest.mark.parametrize("mode", ["documents", "stream"])
def test_accumulating_is_one_large_batch(mode: str, tmp_path: Path) -> None:
    """The same samples in the same step, whichever way they are cut into micro-batches."""
    runs = []
    for size, parts in ((12, 1), (4, 3)):
        cut = [f"train.batch_size={size}", f"train.grad_accum={parts}", f"run.name=by{size}"]
        run = train(tmp_path, "dtype=fp64", f"data.mode={mode}", "train.log_interval=1", *cut)
        runs.append([row["loss/train"] for row in rows(run) if "loss/train" in row])
    assert runs[0] == pytest.approx(runs[1], rel=1e-9)


def test_intervals_of_zero_record_nothing(tmp_path: Path) -> None:
    run = train(
        tmp_path, "train.eval_interval=0", "train.sample_interval=0",
        "train.histogram_interval=0", "data.val_fraction=0", "sample.num=0",
    )  # fmt: skip
    tags = {tag for tag, _ in events(run)}
    assert tags - {"samples"} == SCALARS


def test_figures_agree_with_each_other(tmp_path: Path) -> None:
    """tokens a second x seconds a step = tokens a step; bits = nats / ln 2."""
    run = train(tmp_path, "data.mode=stream", "train.log_interval=1", "train.grad_accum=2")
    config = settings(tmp_path)
    for values in scalars(run):
        if "loss/train" in values:
            tokens = values["tokens_per_second"] * values["ms_per_step"] / 1000
            size = 2 * config.train.batch_size * config.model.block_size
            assert tokens == pytest.approx(size, rel=1e-4)
            assert values["gflops"] > 0
        else:
            bits = values["loss/val"] / 0.6931471805599453
            assert values["bits_per_char/val"] == pytest.approx(bits, rel=1e-6)


def scalars(run: Path) -> list[dict[str, float]]:
    """The scalars of each TensorBoard event that has some."""
    found = [
        {v.tag: v.simple_value for v in event.summary.value if v.HasField("simple_value")}
        for path in event_files(run)
        for event in read_events(path)
    ]
    assert any("loss/val" in values for values in found)
    return [values for values in found if values]
