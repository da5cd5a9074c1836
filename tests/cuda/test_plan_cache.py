"""Chosen algorithms on disk: a second start measures nothing, and takes no damage for a choice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpu_microgpt.ops.cuda.cublaslt import Epilogue
from gpu_microgpt.ops.cuda.device import KNOWN
from gpu_microgpt.ops.cuda.gemm import After
from gpu_microgpt.ops.cuda.plan_cache import PlanCache
from tests.cuda.gemm_cases import MIB, Clock, make, product, used
from tests.cuda.machine import aligned
from tests.cuda_on_cpu.cublaslt import library


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    library().fake_reset()
    yield
    library().fake_reset()


def chosen(folder: Path, fastest: int, **how) -> tuple[int, bool]:
    """The algorithm of a new process where `fastest` is so; whether any was measured."""
    library().fake_reset()
    gemm, _ = make({1: 1.0, 2: 1.0, 3: 1.0, fastest: 0.5}, cache=PlanCache(folder), **how)
    product(gemm)
    return used(), library().fake_matmuls() > 1


def test_a_second_start_takes_the_same_algorithm(tmp_path):
    assert chosen(tmp_path / "made" / "here", 3) == (3, True)
    assert chosen(tmp_path / "made" / "here", 2) == (3, False)
    [path] = (tmp_path / "made" / "here").iterdir()
    assert path.name.startswith("gemm-H200-sm-90-cuBLASLt-900000-fp32-")


def test_a_product_with_a_mask_is_kept_as_well(tmp_path):
    """Of its operation the library says nothing before it knows where the mask is."""
    for fastest, measured in ((3, True), (2, False)):
        library().fake_reset()
        gemm, _ = make({1: 1.0, 2: 1.0, 3: 1.0, fastest: 0.5}, cache=PlanCache(tmp_path))
        mask = aligned((5, 16), np.dtype(np.uint8))
        product(gemm, after=After(Epilogue.RELU_AUX, mask))
        assert (used(), library().fake_matmuls() > 1) == (3, measured)


@pytest.mark.parametrize(
    "other",
    [
        {"mode": "tf32"},
        {"device": KNOWN["sm_80"]},
        {"device": dataclasses.replace(KNOWN["sm_90"], name="H100")},
        {"device": dataclasses.replace(KNOWN["sm_90"], capability=(10, 0))},
    ],
    ids=["mode", "gpu", "name", "arch"],
)
def test_another_machine_chooses_anew(tmp_path, other):
    assert chosen(tmp_path, 3) == (3, True)
    assert chosen(tmp_path, 2, **other) == (2, True)
    assert chosen(tmp_path, 1) == (3, False)
    assert chosen(tmp_path, 1, **other) == (2, False)


def test_another_library_chooses_anew(tmp_path):
    assert chosen(tmp_path, 3) == (3, True)
    library().fake_version(900001)
    gemm, _ = make({1: 1.0, 2: 0.5, 3: 1.0}, cache=PlanCache(tmp_path))
    product(gemm)
    assert used() == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"choices"', '"chosen"'),
        lambda text: text.replace("04000000", "05000000"),
        lambda text: "[]",
        lambda text: '{"digest": "", "choices": null}',
        lambda text: "\0" * 99,
    ],
    ids=["empty", "cut", "names", "bits", "list", "null", "zeros"],
)
def test_a_damaged_file_is_replaced(tmp_path, damage):
    assert chosen(tmp_path, 3) == (3, True)
    [path] = tmp_path.iterdir()
    text = path.read_text("utf-8")
    assert damage(text) != text
    content = json.loads(text)
    path.write_text(damage(text), "utf-8")
    assert all(PlanCache(tmp_path).get(content["machine"], p) is None for p in content["choices"])
    assert chosen(tmp_path, 2) == (2, True)
    assert chosen(tmp_path, 1) == (2, False)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("choice", ["", "zz", "00" * 63, "00" * 64, "00" * 65])
def test_what_is_no_algorithm_is_not_taken(tmp_path, choice):
    chosen(tmp_path, 3)
    gemm, _ = make(cache=(cache := PlanCache(tmp_path)))
    [problem] = json.loads(cache.path(gemm.machine).read_text("utf-8"))["choices"]
    cache.put(gemm.machine, problem, choice)
    assert chosen(tmp_path, 2) == (2, True)
    assert chosen(tmp_path, 1) == (2, False)


def test_a_kept_algorithm_that_does_not_fit_is_not_taken(tmp_path):
    assert chosen(tmp_path, 3) == (3, True)
    assert chosen(tmp_path, 2, nbytes=MIB) == (2, True)  # the third wants 2 MiB


def test_an_unwritable_folder_costs_one_warning(tmp_path, capsys):
    (tmp_path / "file").touch()
    cache = PlanCache(tmp_path / "file" / "kernels")
    gemm, _ = make({1: 1.0, 2: 0.5, 3: 1.0}, cache=cache)
    product(gemm)
    product(gemm, skip=4)
    assert used() == 2
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {cache.folder}: choices of algorithms cannot be kept (Not a directory), so "
        "every start measures them anew, and may compute other last bits"
    ]


def test_two_processes_keep_each_others_choices(tmp_path):
    one, two = PlanCache(tmp_path), PlanCache(tmp_path)
    assert one.get("m", "a") is None
    assert two.get("m", "b") is None
    one.put("m", "a", "1")
    two.put("m", "b", "2")
    again = PlanCache(tmp_path)
    assert (again.get("m", "a"), again.get("m", "b")) == ("1", "2")


def test_the_users_cache_is_the_place(tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / name)
    assert PlanCache().folder == tmp_path / "gpu_microgpt" / "kernels"
    assert not list(tmp_path.iterdir())


def test_the_faster_way_is_taken_and_kept(tmp_path):
    calls = []

    def way(clock: Clock, ms: float):
        def work():
            calls.append(ms)
            clock.now += ms

        return work

    gemm, clock = make(cache=PlanCache(tmp_path))
    assert gemm.fastest("a", (way(clock, 2), way(clock, 1))) == 1
    assert gemm.fastest("b", (way(clock, 1), way(clock, 2))) == 0
    calls.clear()
    gemm, clock = make(cache=PlanCache(tmp_path))
    assert gemm.fastest("a", (way(clock, 1), way(clock, 2))) == 1
    assert not calls
