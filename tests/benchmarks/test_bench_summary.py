"""What is written of a race, with times and memory that are made up."""

from __future__ import annotations

import io

import pytest

from benchmarks.jobs import Entry, load_entry
from benchmarks.summary import Figures, summarize, table
from benchmarks.variants import VARIANTS
from nitp_titan.models.costs import flops, mtp_flops, parts_of_shape
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.tools.estimate.memory import GIB

ABOUT = {"device": "a GPU", "device_type": "cuda", "torch": "2", "config": "x.toml", "ranks": 2, "peak_flops": 1e12}
KEYS = {"tokens_per_second", "mfu_percent", "step_ms", "peak_memory_gib"}


def entry(name: str, *words: str, called: str | None = None) -> Entry:
    words = ("--training.local_batch_size=2", *words)
    return load_entry(
        "train_configs/debug.toml", words, VARIANTS[name], world_size=2, dump_folder="/tmp/none", name=called
    )


def figures(gib: float) -> Figures:
    return Figures(parameters=1, state_bytes=GIB, peak_bytes=int(gib * GIB), first_loss=5.0)


def test_figures_of_a_variant():
    names = ["ntp", "nitp", "mtp"]
    seconds = {"ntp": [0.2, 0.1, 0.4], "nitp": [0.202, 0.102, 0.404], "mtp": [0.22, 0.11, 0.44]}
    memory = {"ntp": figures(10), "nitp": figures(10.2), "mtp": figures(11)}
    result = summarize(ABOUT, [entry(name) for name in names], memory, seconds)

    assert {"device", "torch", "config", "variants", "overhead_percent"} <= result.keys()
    assert all(values.keys() >= KEYS for values in result["variants"].values())
    ntp = result["variants"]["ntp"]
    assert ntp["step_ms"] == {"median": 200, "min": 100, "max": 400}
    tokens = 2 * 2 * 256  # ranks x sequences x length
    assert ntp["tokens_per_second"] == pytest.approx(tokens / 0.2)
    assert ntp["peak_memory_gib"] == 10
    assert result["baseline"] == "ntp"
    assert result["overhead_percent"] == pytest.approx({"nitp": 1, "mtp": 10})
    assert result["overhead_percent_by_round"]["nitp"] == {"median": 1, "min": 1, "max": 2}
    assert result["peak_memory_overhead_percent"] == pytest.approx({"nitp": 2, "mtp": 10})
    assert result["nitp_share_of_mtp_overhead"] == pytest.approx(0.1)
    assert result["speed_over"]["ntp"]["mtp"] == pytest.approx(1.1)
    assert result["speed_over"]["mtp"]["ntp"] == pytest.approx(1 / 1.1, abs=1e-4)

    # By the variant's own FLOPs, over the peak of both devices.
    parts = parts_of_shape(FLAVORS["debug"].shape)
    model = flops(parts, 256)["with_attention"]
    own = {"ntp": model, "nitp": model + 72 * 128**2 + 18 * 128, "mtp": model + mtp_flops(parts, 256)["with_attention"]}
    for name, values in result["variants"].items():
        assert values["flops_per_token"] == own[name]
        median = {"ntp": 0.2, "nitp": 0.202, "mtp": 0.22}[name]
        assert values["mfu_percent"] == pytest.approx(100 * own[name] * tokens / median / 2e12, abs=0.01)


def test_a_cpu_has_no_mfu():
    result = summarize({**ABOUT, "peak_flops": None}, [entry("ntp")], {"ntp": figures(1)}, {"ntp": [1.0]})
    assert result["variants"]["ntp"]["mfu_percent"] is None
    assert result["overhead_percent"] == {}


def test_without_ntp_the_first_is_the_baseline():
    seconds = {"stock": [0.1], "nitp": [0.15]}
    memory = {name: figures(1) for name in seconds}
    result = summarize(ABOUT, [entry("stock"), entry("nitp")], memory, seconds)
    assert result["baseline"] == "stock"
    assert result["overhead_percent"] == pytest.approx({"nitp": 50})


def test_slices_are_extrapolated_and_not_compared():
    # A step of 10 + 4 ms a layer; NITP adds 1 ms: 1 / 106 of 24 layers.
    entries = [
        entry("ntp", "--model.shape.n_layers=6"),
        entry("nitp", "--model.shape.n_layers=6"),
        entry("ntp", "--model.shape.n_layers=3", called="ntp@3"),
    ]
    seconds = {"ntp": [0.034, 0.034], "nitp": [0.035, 0.035], "ntp@3": [0.022, 0.022]}
    result = summarize(ABOUT, entries, {name: figures(1) for name in seconds}, seconds, full_layers=24)
    assert set(result["overhead_percent"]) == {"nitp"}
    assert set(result["variants"]) == set(seconds)
    assert result["extrapolation"]["full_step_ms"] == pytest.approx(106)
    assert result["extrapolation"]["overhead_percent"]["nitp"] == pytest.approx(100 / 106, abs=1e-3)
    assert result["extrapolation"]["overhead_percent_by_round"]["nitp"]["max"] == pytest.approx(100 / 106, abs=1e-3)
    seconds["ntp@3"] = [0.05, 0.05]
    noisy = summarize(ABOUT, entries, {name: figures(1) for name in seconds}, seconds, full_layers=24)
    assert "too noisy" in noisy["extrapolation"]["failed"]


def test_the_table_shows_every_variant_and_note(monkeypatch):
    from rich.console import Console

    from nitp_titan.runtime import machine

    monkeypatch.setattr(machine, "torch_version", lambda: (2, 11))
    seconds = {"ntp": [0.1], "nitp": [0.15]}
    result = summarize(ABOUT, [entry("ntp"), entry("nitp")], {name: figures(1) for name in seconds}, seconds)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table({**result, "failed": {"mtp": "it broke"}}))
    text = console.export_text()
    assert "+50.00 %" in text
    assert "mtp failed: it broke" in text
    # On this torch upstream's chunked loss fails, and the result says what took its place.
    assert result["variants"]["ntp"]["loss"] == "cross_entropy"
    assert "plain cross-entropy, not compiled: its chunked one fails on this torch" in text
