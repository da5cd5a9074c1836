"""What Metrics writes, as the real TensorBoard serves it, with each of its two readers."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from gpu_microgpt.metrics import Metrics, histogram_buckets

LOSSES = {step: 3.0 - step / 64 for step in range(1, 31)}  # exact in float32
WEIGHTS = np.random.default_rng(0).normal(size=(50, 20)).astype(np.float32)
GREY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
COLOUR = np.random.default_rng(1).integers(0, 256, (5, 3, 3), dtype=np.uint8)
CONFIG = {
    "seed": 1337,
    "resume": None,
    "model": {"n_layer": 4, "scale_residual_init": False},
    "optimizer": {"name": "adam", "lr": 3e-4, "betas": [0.9, 0.98]},
}
TYPES = {
    "seed": "FLOAT64",
    "model.n_layer": "FLOAT64",
    "model.scale_residual_init": "BOOL",
    "optimizer.name": "STRING",
    "optimizer.lr": "FLOAT64",
    "optimizer.betas": "STRING",
}
STATUSES = ["STATUS_SUCCESS", "STATUS_FAILURE"]
YAML = "model:\n  n_layer: 4\n\n# *not* Markdown: <b>_x_</b>\n"


def write_runs(logs: Path) -> None:
    """Run `a`: killed after step 24, resumed at 20, finished. Run `b`: failed."""
    for first, last, resume_step in ((1, 24, None), (21, 30, 20)):
        metrics = Metrics(logs / "a", resume_step=resume_step)
        metrics.text(0, "config", YAML)
        metrics.hparams(CONFIG, ["loss/train", "loss/val"])
        for step in range(first, last + 1):
            metrics.scalars(step, {"loss/train": LOSSES[step], "lr": 0.5})
            if step % 10 == 0:
                metrics.scalars(step, {"loss/val": 4.0 - step / 64})
                metrics.text(step, "samples", f"anna\nbob {step}")
                metrics.histogram(step, "weights/wte", WEIGHTS * step)
                metrics.image(step, "attention/0", GREY)
        metrics.flush()
    metrics.histogram(30, "empty", np.zeros(0))
    metrics.histogram(30, "equal", np.full(7, 0.5))
    metrics.image(30, "colour", COLOUR)
    metrics.close()
    with Metrics(logs / "b") as metrics:
        metrics.hparams(CONFIG | {"seed": 1}, ["loss/train", "loss/val"])
        metrics.scalars(1, {"loss/train": float("nan")})
        metrics.close(success=False)


class Server:
    """TensorBoard on a free loopback port."""

    def __init__(self, logs: Path, load_fast: str) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tensorboard.main", "--logdir", str(logs)),
                *("--host", "127.0.0.1", "--port", "0"),
                *("--reload_interval", "1", "--load_fast", load_fast),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._output: list[str] = []
        self._http = requests.Session()
        self._http.trust_env = False  # no proxy to this machine

    def wait(self) -> None:
        """Return once the last event of both runs is read; fail when that takes far too long."""
        threading.Thread(target=self._read, daemon=True).start()
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self._process.poll() is None:
            found = re.search(r"(http://127\.0\.0\.1:\d+)", "".join(self._output))
            if found:
                self._url = found[1]
                if {s["status"] for s in self.sessions().values()} == set(STATUSES):
                    return
            time.sleep(0.2)
        pytest.fail("TensorBoard did not come up: " + "".join(self._output))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._output.append(line)

    def get(self, path: str, **query: Any) -> Any:
        answer = self._http.get(f"{self._url}/data/plugin/{path}", params=query, timeout=30)
        answer.raise_for_status()
        return answer.content if path.endswith("individualImage") else answer.json()

    def post(self, path: str, body: Any) -> Any:
        answer = self._http.post(f"{self._url}/data/plugin/{path}", json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def sessions(self) -> dict[str, dict[str, Any]]:
        """Run -> its session on the HParams tab, with its settings under "hparams"."""
        query = {
            "experimentName": "",
            "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_RUNNING", *STATUSES],
            "colParams": [{"hparam": name} for name in TYPES],
            "startIndex": 0,
            "sliceSize": 10,
        }
        groups = self.post("hparams/session_groups", query).get("sessionGroups", [])
        return {
            session["name"]: {**session, "hparams": group["hparams"]}
            for group in groups
            for session in group["sessions"]
        }

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._http.close()


@pytest.fixture(scope="module", params=["true", "false"], ids=["fast", "python"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    if request.param == "true":
        pytest.importorskip("tensorboard_data_server", reason="no fast reader on this platform")
    logs = tmp_path_factory.mktemp("logs")
    write_runs(logs)
    server = Server(logs, request.param)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def test_scalars(server: Server) -> None:
    tags = server.get("scalars/tags")
    assert {run: set(tags[run]) for run in tags} == {
        "a": {"loss/train", "loss/val", "lr"},
        "b": {"loss/train"},
    }
    points = server.get("scalars/scalars", run="a", tag="loss/train")
    assert [(step, value) for _, step, value in points] == list(LOSSES.items())
    points = server.get("scalars/scalars", run="a", tag="loss/val")
    assert [(step, value) for _, step, value in points] == [
        (step, 4.0 - step / 64) for step in (10, 20, 30)
    ]
    assert server.get("scalars/scalars", run="b", tag="loss/train")[0][1:] == [1, "NaN"]


def test_texts_are_shown_as_they_stand(server: Server) -> None:
    assert set(server.get("text/tags")["a"]) == {"config", "samples"}
    (config,) = server.get("text/text", run="a", tag="config")
    shown = "model:\n  n_layer: 4\n\n# *not* Markdown: &lt;b&gt;_x_&lt;/b&gt;"
    assert config["text"] == f"<pre><code>{shown}\n</code></pre>"
    samples = server.get("text/text", run="a", tag="samples")
    assert [(s["step"], s["text"]) for s in samples] == [
        (step, f"<pre><code>anna\nbob {step}\n</code></pre>") for step in (10, 20, 30)
    ]


def test_histograms(server: Server) -> None:
    assert set(server.get("histograms/tags")["a"]) == {"weights/wte", "empty", "equal"}
    histograms = server.get("histograms/histograms", run="a", tag="weights/wte")
    assert [step for _, step, _ in histograms] == [10, 20, 30]
    for _, step, buckets in histograms:
        np.testing.assert_array_equal(buckets, histogram_buckets(WEIGHTS * step))
    assert server.get("histograms/histograms", run="a", tag="empty")[0][1:] == [30, []]
    (equal,) = server.get("histograms/histograms", run="a", tag="equal")
    assert equal[1:] == [30, [[0.5, 0.5, 7.0]]]
    percentiles = server.get("distributions/distributions", run="a", tag="weights/wte")
    middle = dict(percentiles[0][2])[5000]  # in basis points
    assert abs(middle - np.median(WEIGHTS * 10)) < 0.2


def test_images(server: Server) -> None:
    assert set(server.get("images/tags")["a"]) == {"attention/0", "colour"}
    for tag, pixels, steps in (("attention/0", GREY, [10, 20, 30]), ("colour", COLOUR, [30])):
        images = server.get("images/images", run="a", tag=tag, sample=0)
        assert [image["step"] for image in images] == steps
        for image in images:
            _, _, key = image["query"].partition("blob_key=")
            png = server.get("images/individualImage", blob_key=requests.utils.unquote(key))
            picture = Image.open(io.BytesIO(png))
            assert picture.format == "PNG"
            np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_hparams(server: Server) -> None:
    experiment = server.post("hparams/experiment", {"experimentName": ""})
    assert {info["name"]: info["type"] for info in experiment["hparamInfos"]} == {
        name: f"DATA_TYPE_{kind}" for name, kind in TYPES.items()
    }
    columns = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert columns == ["loss/train", "loss/val"]
    sessions = server.sessions()
    assert set(sessions) == {"a", "b"}
    assert sessions["a"]["hparams"] == {
        "seed": 1337.0,
        "model.n_layer": 4.0,
        "model.scale_residual_init": False,
        "optimizer.name": "adam",
        "optimizer.lr": 3e-4,
        "optimizer.betas": "[0.9, 0.98]",
    }
    assert {v["name"]["tag"]: v["value"] for v in sessions["a"]["metricValues"]} == {
        "loss/train": LOSSES[30],
        "loss/val": 4.0 - 30 / 64,
    }
    assert [sessions[run]["status"] for run in "ab"] == STATUSES
