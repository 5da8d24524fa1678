"""docs/performance.md is what its results say; bars are met, missed or unmeasured."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import page
from benchmarks.bars import BARS, Results
from benchmarks.results import RESULTS

THROUGHPUT = {
    "device": "NVIDIA H100 80GB HBM3",
    "device_type": "cuda",
    "torch": "2",
    "ranks": 1,
    "commit": "0123456789abc",
    "rounds": 5,
    "config": "train_configs/nitp_0.5b.toml",
    "job_overrides": ["--training.local_batch_size=4"],
    "baseline": "ntp",
    "tokens_per_step": 32768,
    "variants": {
        "ntp": {"tokens_per_second": 90_000.0, "mfu_percent": 46.0, "peak_memory_gib": 20.0, "notes": []},
        "nitp": {"tokens_per_second": 89_000.0, "mfu_percent": 46.5, "peak_memory_gib": 20.5, "notes": ["so and so"]},
    },
    "overhead_percent": {"nitp": 1.1},
    "overhead_percent_by_round": {"nitp": {"median": 1.1, "min": 1.0, "max": 1.3}},
    "peak_memory_overhead_percent": {"nitp": 2.5},
    "speed_over": {"ntp": {"stock": 0.99, "nitp": 1.01}},
    "nitp_share_of_mtp_overhead": 0.05,
}
for name, ms in (("ntp", 364.0), ("nitp", 368.0)):
    THROUGHPUT["variants"][name]["step_ms"] = {"median": ms, "min": ms, "max": ms}
LOSS = {
    "device": "NVIDIA H100 80GB HBM3",
    "device_type": "cuda",
    "torch": "2",
    "ranks": 1,
    "commit": "?",
    "rounds": 5,
    "cases": [
        {"tokens": tokens, "vocabulary": 100, "width": 8, "implementations": {}, "skipped": {"liger": "not there"}}
        | {"dtype": "bfloat16", "compile": True}
        | {"nitp": {"time_overhead_percent": time, "peak_above_cross_entropy_mib": 65.0}}
        for tokens, time in ((8192, 12.0), (8192, 14.0), (32768, 99.0))
    ],
}


def folder_with(tmp_path, **results):
    for name, result in results.items():
        path = tmp_path / "gpu" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result))
    return tmp_path


def rows(tmp_path, **results) -> dict[str, str]:
    found = page.blocks(folder_with(tmp_path, **results))["bars"][2:]
    return {row.split(" | ")[0].removeprefix("| "): row for row in found}


def test_the_page_is_what_its_results_say():
    """After a new result, or a change of the roofline: python -m benchmarks.page."""
    assert page.main(["--check"]) == 0


def test_committed_results_are_read():
    found = Results.read(RESULTS, "cpu")
    assert {result["config"] for result in found.throughput} == {
        "train_configs/debug.toml",
        "train_configs/debug_moe.toml",
        "train_configs/nitp_0.5b.toml",
    }
    counted = Results.read(RESULTS, "meta")
    assert all("-dirty" not in result["commit"] for result in [*found.throughput, *found.loss, *counted.loss])
    assert found.loss
    assert counted.loss


def test_without_a_gpu_every_bar_is_unmeasured(tmp_path):
    found = rows(tmp_path)
    assert len(found) == len(BARS)
    assert all(row.endswith("| unmeasured | unmeasured |") for row in found.values())
    cpu = copy.deepcopy(THROUGHPUT) | {"device_type": "cpu"}
    counted = {"device_type": "meta", "cases": []}
    assert rows(tmp_path, cpu=cpu, counted=counted) == found


def test_bars_are_met_or_missed(tmp_path):
    found = rows(tmp_path, a=THROUGHPUT, b=LOSS)
    none = "| unmeasured |"
    assert found["0.5B: NITP's time over NTP's"].endswith(f"| at most 1.20 % | 0.90 % | +1.10 %, met {none}")
    assert found["0.5B: tokens/s with NITP"].endswith(f"| at least 100,000 | 110,000 | 89,000, missed {none}")
    assert found["0.5B: NITP's peak memory over NTP's"].endswith(f"| +2.50 %, met {none}")
    assert found["0.5B: our NTP's speed in stock TorchTitan's"].endswith(f"| 0.990, missed {none}")
    assert found["0.5B: NITP's overhead in MTP-1's"].endswith(f"| 0.050, beyond {none}")
    # The worst of the cases with 8,192 tokens, and no other.
    assert found["loss of 8,192 tokens: NITP's time over cross-entropy alone"].endswith(f"| +14.0 %, met {none}")
    assert found["loss of 8,192 tokens: NITP's peak above cross-entropy alone"].endswith(f"| +65.0 MiB, missed {none}")
    assert found["9B-A1B, from slices: NITP's time over NTP's"].endswith(f"{none} unmeasured |")
    # Of an H200 the same, in its own column.
    others = {"a": THROUGHPUT | {"device": "NVIDIA H200"}, "b": LOSS | {"device": "NVIDIA H200"}}
    swapped = rows(tmp_path, **others)
    assert swapped["0.5B: NITP's time over NTP's"].endswith("| unmeasured | +1.10 %, met |")
    assert swapped["loss of 8,192 tokens: NITP's time over cross-entropy alone"].endswith(
        "| unmeasured | +14.0 %, met |"
    )


def test_the_fastest_result_says_the_speed(tmp_path):
    faster = copy.deepcopy(THROUGHPUT) | {"rounds": 1, "baseline": "ntp_joint", "overhead_percent": {"nitp": 0.1}}
    faster["job_overrides"] = ["--activation_checkpoint.mode=none"]
    faster["variants"]["nitp"]["tokens_per_second"] = 120_000.0
    found = rows(tmp_path, a=THROUGHPUT, b=faster)
    assert found["0.5B: tokens/s with NITP"].endswith("| 120,000, beyond | unmeasured |")
    # Overheads are over next-token prediction without NITP's model.
    assert found["0.5B: NITP's time over NTP's"].endswith("| +1.10 %, met | unmeasured |")


@pytest.mark.parametrize(
    "other",
    [
        {"device": "NVIDIA H200"},
        {"ranks": 2},
        {"baseline": "ntp_joint"},
        {"job_overrides": ["--training.local_batch_size=4", "--optimizer.implementation=foreach"]},
        {"job_overrides": ["--training.seq_len", "1024"]},
        {"rounds": 3},
    ],
    ids=str,
)
def test_bars_speak_of_one_gpu_and_the_job_as_it_is(other, tmp_path):
    # Read first, as what gpu_suite.sh calls throughput-0.5b-foreach.json is.
    worse = copy.deepcopy(THROUGHPUT) | other
    worse["overhead_percent"] = {"nitp": 9.0}
    bar = "0.5B: NITP's time over NTP's"
    assert "| +1.10 %, met |" in rows(tmp_path, a=worse, b=THROUGHPUT)[bar]
    (tmp_path / "gpu" / "b.json").unlink()
    assert rows(tmp_path, a=worse)[bar].endswith("| 0.90 % | +9.00 %, missed | unmeasured |") is ("rounds" in other)


@pytest.mark.parametrize("other", [{"dtype": "float32"}, {"compile": False}, {"tokens": 4096}], ids=str)
def test_bars_of_the_loss_speak_of_compiled_bf16(other, tmp_path):
    loss = copy.deepcopy(LOSS)
    loss["cases"] = [case | other for case in loss["cases"]]
    bar = "loss of 8,192 tokens: NITP's time over cross-entropy alone"
    assert rows(tmp_path, a=loss)[bar].endswith("| unmeasured | unmeasured |")


def test_slices_are_not_the_whole_model(tmp_path):
    slices = copy.deepcopy(THROUGHPUT) | {
        "config": "train_configs/nitp_9b-a1b.toml",
        "extrapolation": {"overhead_percent": {"nitp": 0.9}, "arithmetic": ["a sum"]},
    }
    found = rows(tmp_path, a=slices)
    bar = "9B-A1B, from slices: NITP's time over NTP's"
    assert found[bar].endswith("| +0.90 %, missed | unmeasured |")
    none = "| unmeasured | unmeasured |"
    assert found["0.5B: NITP's time over NTP's"].endswith(none)
    assert "- a sum" in page.blocks(tmp_path)["throughput"]
    assert rows(tmp_path, a=slices | {"config": "nitp_0.5b.toml"})["0.5B: NITP's time over NTP's"].endswith(none)


def test_the_gap_is_to_the_limit_of_the_same_batch(tmp_path):
    from benchmarks.roofline import roofline

    limit = 1e3 * roofline("0.5B", sequences=4).nitp_seconds
    found = page.blocks(folder_with(tmp_path, a=THROUGHPUT))["gap"][2]
    assert found.endswith(f"| {limit:.2f} | 4.00 | {4 - limit:+.2f} | unmeasured |")
    other_card = page.blocks(folder_with(tmp_path, a=THROUGHPUT | {"device": "NVIDIA H200"}))["gap"][2]
    assert other_card.endswith(f"| {limit:.2f} | unmeasured | unmeasured | 4.00 |")
    for variant in ("ntp", "nitp"):  # both times are of one result
        alone = copy.deepcopy(THROUGHPUT) | {"rounds": 9}
        del alone["variants"][variant]
        assert page.blocks(folder_with(tmp_path, a=THROUGHPUT, b=alone))["gap"][2] == found
    (tmp_path / "gpu" / "b.json").unlink()
    other = copy.deepcopy(THROUGHPUT) | {"tokens_per_step": 65536}
    assert page.blocks(folder_with(tmp_path, a=other))["gap"][2].endswith("| unmeasured | unmeasured |")


PROFILE = {
    "wall_ms": 10.0,
    "busy_ms": 9.0,
    "idle_ms": 1.0,
    "groups": {"products": 6.0, "attention": 3.0},
    "kernels": [{"name": "nvjet_x", "group": "products", "count": 3, "ms": 6.0}],
}


def test_tiles_of_flex_attention_are_a_table(tmp_path):
    row = {"options": {}, "ms": {"median": 2.0, "min": 1.9, "max": 2.1}, "error": 0.0025}
    fast = row | {"ms": {"median": 1.5, "min": 1.4, "max": 1.6}}
    case = {"flavor": "0.5B", "sequences": 4, "seq_len": 8192, "forward": {"torch's": row, "64 64 4 2": fast}}
    facts = {key: THROUGHPUT[key] for key in ("device", "device_type", "torch", "commit", "rounds")}
    found = page.blocks(folder_with(tmp_path, a={**facts, "attention": [case]}))["attention"]
    assert found[4:6] == [
        "| 0.5B, 4 x 8,192 tokens, forward | 64 64 4 2 | 1.50 (1.40 .. 1.60) | 0.75 | 0.0025 |",
        "| 0.5B, 4 x 8,192 tokens, forward | torch's | 2.00 (1.90 .. 2.10) | 1.00 | 0.0025 |",
    ]


def test_where_a_steps_time_goes(tmp_path):
    profiled = copy.deepcopy(THROUGHPUT) | {"profiles": {"nitp": PROFILE}}
    profiled["job_overrides"] = ["--activation_checkpoint.mode=none"]
    profiled["variants"]["nitp"]["layers"] = 24
    found = page.blocks(folder_with(tmp_path, a=profiled))["kernels"]
    what = "`train_configs/nitp_0.5b.toml`, 24 blocks, recomputation none, NVIDIA H100 80GB HBM3"
    assert found[2] == f"| {what} | nitp | 6.0 | 3.0 | 1.0 |"
    assert "| 6.00 | 3 | `nvjet_x` |" in found
    assert page.blocks(folder_with(tmp_path, a=THROUGHPUT))["kernels"] == ["A step's kernels: unmeasured."]


def test_tables_of_a_gpu(tmp_path):
    found = page.blocks(folder_with(tmp_path, a=THROUGHPUT, b=LOSS))
    assert (
        "| nitp | 89,000 | 46.5 % | 368.0 (368.0 .. 368.0) | 20.50 | +1.10 % | +1.10 % (+1.0 .. +1.3) |"
        in found["throughput"]
    )
    assert "- nitp: so and so" in found["throughput"]
    assert any("not there" in line for line in found["loss"])


@pytest.mark.parametrize(("text", "message"), [('{"device": 3', "not JSON: "), ("[1]", "not a result")])
def test_a_broken_result_is_named(text, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpu" / "x.json"
    path.parent.mkdir()
    path.write_text(text)
    monkeypatch.setattr(page.blocks, "__defaults__", (tmp_path,))
    before = page.PAGE.read_text()
    assert page.main([]) == 2
    assert f"{path}: {message}" in capsys.readouterr().err
    assert page.PAGE.read_text() == before


def test_filling_a_page():
    text = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb\n"
    filled = page.fill(text, {"x": ["new", "lines"]})
    assert filled == "a\n<!-- begin: x -->\nnew\nlines\n<!-- end: x -->\nb\n"
    assert page.fill(filled, {"x": ["new", "lines"]}) == filled
    with pytest.raises(ValueError, match="expected x, y"):
        page.fill(text, {"x": [], "y": []})
