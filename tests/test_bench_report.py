"""The benchmark's page: medians, ratios, refusals, tables."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_microgpt import bench_runs
from gpu_microgpt.bench_report import PIN, UNPINNED, markdown, summary, told
from gpu_microgpt.bench_rows import LOSS, MEAN, Row
from gpu_microgpt.bench_setting import Setting
from gpu_microgpt.errors import UserError
from tests.bench_cases import ran, tiny


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting(tiny(tmp_path))


def test_medians_and_ratios(setting):
    runs = {
        "ours": [ran(1.0, ops={"linear": 0.75, "adamw": 0.25}), ran(4.0), ran(2.0)],
        UNPINNED: [ran(1.0, sgemm_gflops=400.0)] * 3,
        "torch": [ran(10.0), ran(8.0), ran(30.0)],
        "jax": [ran(1.0), {"refused": "no such processor"}, ran(1.0)],
    }
    result = summary("tiny", setting.row, setting, runs)
    assert result["value"] == 500  # 2 ms for 4 samples
    assert result["peers"]["torch"]["value"] == 2500
    assert result["peers"]["torch"]["ratio"] == 10  # of 10, 2, 15, not 10 / 2
    assert result["peers"]["jax"] == {"refused": "no such processor"}
    assert result["gflops"] == pytest.approx(setting.flops() / 2e-3 / 1e9)
    assert result["share_of_peak"] == pytest.approx(result["gflops"] / 100)
    assert result[UNPINNED]["share_of_peak"] == pytest.approx(result["gflops"] * 2 / 400)
    assert result["ops"] == {"linear": 0.75, "adamw": 0.25}


def test_more_tokens_a_second_are_better(setting):
    row = Row("generate", "writing", "names", unit="tokens/s")

    def wrote(speed: float) -> dict[str, Any]:
        return {"tokens_per_second": speed, "tokens": [1, 2], "sgemm_gflops": 1.0, "engine": "it"}

    result = summary("w", row, setting, {"ours": [wrote(300.0)], "torch": [wrote(100.0)]})
    assert (result["value"], result["peers"]["torch"]["ratio"]) == (300, 3)
    other = wrote(100.0) | {"tokens": [1, 3]}
    with pytest.raises(UserError, match=r"w: torch writes another text, .*: no race"):
        summary("w", row, setting, {"ours": [wrote(300.0)], "torch": [other]})


@pytest.mark.parametrize(("narrow", "gap"), [(False, 1e-3), (True, 3e-2)])
def test_engines_have_to_compute_the_same(setting, narrow, gap):
    row = tiny(setting.corpus.path.parent, differs=("dtype=bf16",) if narrow else ())
    near = [3.0, 2.9 * (1 + gap / 20)]
    summary("tiny", row, setting, {"ours": [ran(1)], "torch": [ran(1, losses=near)]})
    for losses in ([3.0, 2.9 * (1 + gap)], [float("nan"), 2.9]):
        runs = {"ours": [ran(1)], "torch": [ran(1, losses=losses)]}
        with pytest.raises(UserError, match=r"tiny: torch computes another loss at step \d, .* no"):
            summary("tiny", row, setting, runs)


def test_what_this_cpu_cannot_do_is_said_and_peers_are_shown(setting):
    runs = {"ours": [{"refused": "no AVX512_BF16"}], "torch": [ran(8.0)]}
    result = summary("tiny", setting.row, setting, runs)
    assert result["refused"] == "no AVX512_BF16"
    text = markdown({"machine": {}, "rounds": 1, "results": [result]})
    assert "- tiny: not on this CPU: no AVX512_BF16" in text
    assert cells(text, "tiny (`tiny`)")[2:] == ["no, see below", "2,000", ""]


def cells(text: str, first: str) -> list[str]:
    """Of the table's line that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page(setting):
    runs = {
        "ours": [ran(2.0, ops={"linear": 0.75, "adamw": 0.25})],
        UNPINNED: [ran(1.0, sgemm_gflops=400.0)],
        "torch": [ran(10.0, positions=40.0)],
        "jax": [{"refused": "no such processor"}],
    }
    results = [summary("tiny", setting.row, setting, runs)]
    whole = Row("compile", "compiling", "names", unit="s")
    took = {"seconds": 31.4, "again": 3.1, "runs": 2}
    results.append(summary("first", whole, setting, {"ours": [took]}))
    ends = {"seconds": 1.5, "loss": 1.98768, "steps": 3000}
    results.append(summary("loss", Row("loss", "to", "names", unit="s"), setting, {"ours": [ends]}))
    text = markdown({"machine": {"cores": 2}, "rounds": 3, "results": results})
    params = f"{setting.dims.num_params:,}"
    assert cells(text, "tiny (`tiny`)")[1:] == [params, "500", "2,500", "5.00", "no, see below", ""]
    assert cells(text, "compiling (`first`)")[1:] == [params, "31.4"]
    assert cells(text, "tiny")[3:] == ["100", f"{results[0]['share_of_peak']:.0%}", "1.00",
                                      "ours 28, torch 40"]  # fmt: skip
    for line in (
        "- cores: 2",
        "- rounds: 3",
        "- tiny: jax failed: no such processor",
        "- first: 2 whole runs; the same again, kernels compiled: 3.1 s",
        f"- loss: ours ends at 1.9877, mean of the last {MEAN} of 3,000 steps",
        "- tiny: linear 75%, adamw 25%",
        f"## Without {PIN}",
        "| tiny | us/sample | 500 | 250 | 100 | 400 |",
    ):
        assert line in text.splitlines()
    assert len([line for line in text.splitlines() if line.startswith("## ")]) == 5


def test_losses_of_a_run_are_read_and_judged():
    records = [{"step": 1, "loss/train": 3.0}, {"step": 1, "loss/val": 9.0}]
    records += [{"step": s, "loss/train": LOSS - 0.25} for s in range(2, MEAN + 2)]
    losses = bench_runs.losses_of(records)
    assert len(losses) == MEAN + 1
    assert bench_runs.mean_of_last(losses) == LOSS - 0.25
    with pytest.raises(UserError, match=f"mean loss of the last {MEAN} of 100 steps is 2.0000"):
        bench_runs.mean_of_last([LOSS] * MEAN)
    with pytest.raises(UserError, match="of 99 steps"):
        bench_runs.mean_of_last([LOSS - 1] * (MEAN - 1))


def test_what_is_told_on_the_way(setting):
    assert told(setting.row, setting, ran(2.0)) == "500 us/sample"
    assert told(setting.row, setting, {"refused": "no"}) == "not measured: no"
