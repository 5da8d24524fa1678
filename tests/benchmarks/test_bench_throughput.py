"""The throughput program at toy size, from the command line to its JSON. No times are asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import jobs, race, throughput
from benchmarks.contestant import Contestant
from benchmarks.jobs import Data, load_entry, trainer_config
from benchmarks.variants import VARIANTS
from nitp_titan.models.costs import parts_of_shape
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.nitp.config import NITPConfig, projector_params
from nitp_titan.runtime import machine
from tests.helpers.trainers import running

ROOT = Path(__file__).parent.parent.parent
TINY = ("--training.seq_len=32", "--training.local_batch_size=2", "--loss.chunk_tokens=50")
SHORT = ("--repeats", "3", "--steps", "1", "--warmup", "2", "--mean-document", "20")
KEYS = {"device", "torch", "torchtitan", "commit", "config", "variants", "overhead_percent"}
VARIANT_KEYS = {"tokens_per_second", "mfu_percent", "step_ms", "peak_memory_gib"}


def run(out: Path, job: str, *arguments: str, code: int = 0) -> dict[str, Any]:
    config = f"train_configs/{job}.toml"
    with pytest.MonkeyPatch.context() as patch:
        # A process of its own, as far as the program can tell; it sets these.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")
            patch.delenv(name)
        assert throughput.main(["--config", config, "--out", str(out / "x.json"), *SHORT, *TINY, *arguments]) == code
    return json.loads((out / "x.json").read_text())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    every = ["--variants", ",".join(VARIANTS), "--variant", "wide:nitp.projector_ratio=8"]
    return run(tmp_path_factory.mktemp("dense"), "debug", *every)


def test_keys_are_the_fixed_ones(dense):
    assert dense.keys() >= KEYS
    assert dense["config"] == "train_configs/debug.toml"
    assert list(dense["variants"]) == [*VARIANTS, "wide"] == dense["order"]
    for values in dense["variants"].values():
        assert values.keys() >= VARIANT_KEYS
        step = values["step_ms"]
        assert 0 < step["min"] <= step["median"] <= step["max"]
        assert len(values["rounds_ms"]) == 3
        assert values["tokens_per_second"] == pytest.approx(64 / step["median"] * 1000, rel=1e-3)
        assert values["mfu_percent"] is None
        assert values["peak_memory_gib"] > values["state_gib"] > 0
    assert set(dense["overhead_percent"]) == {"nitp", "ntp_joint", "mtp", "stock", "wide"}
    assert dense["failed"] == {}


def test_variants_are_different_jobs(dense):
    variants = dense["variants"]
    total = parts_of_shape(FLAVORS["debug"].shape).total()
    projector = projector_params(128, NITPConfig())
    block = parts_of_shape(FLAVORS["debug"].shape).blocks[-1].params()
    assert {name: values["parameters"] for name, values in variants.items()} == {
        "ntp": total,
        "nitp": total + projector,
        "ntp_joint": total + projector,
        "mtp": total + block + 2 * 128**2 + 3 * 128,
        "stock": total,
        "wide": total + 2 * projector,
    }
    # fp32 weights and two moments; before its first step the projector has no moments.
    for name, values in variants.items():
        floats = 3 * values["parameters"] - (2 * projector if name == "ntp_joint" else 0)
        assert values["state_gib"] == pytest.approx(4 * floats / 2**30, rel=0.02)
    assert {name: values["trainer"] for name, values in variants.items()} == {
        **dict.fromkeys(("ntp", "nitp", "ntp_joint", "wide"), "nitp_titan"),
        "mtp": "mtp",
        "stock": "torchtitan",
    }
    first = {name: values["first_loss"] for name, values in variants.items()}
    # The same batch, model and seed: NTP's loss, and what each adds to it.
    assert first["ntp"] == first["stock"] == pytest.approx(first["ntp_joint"], rel=1e-6)
    assert first["nitp"] > first["ntp"] + 0.5
    assert first["mtp"] == pytest.approx(1.3 * first["ntp"], rel=0.1)
    assert all(values["last_loss"] < values["first_loss"] for values in variants.values())
    assert variants["ntp"]["last_loss"] == variants["stock"]["last_loss"]
    assert variants["nitp"]["flops_per_token"] - variants["ntp"]["flops_per_token"] == 72 * 128**2 + 18 * 128
    assert variants["ntp_joint"]["flops_per_token"] == variants["ntp"]["flops_per_token"]


def test_mixture_of_experts_in_slices(tmp_path):
    found = run(tmp_path, "debug_moe", "--variants", "ntp,nitp,mtp,stock", "--depths", "3,2", "--repeats", "1")
    variants = found["variants"]
    assert {name: values["layers"] for name, values in variants.items()} == {
        **dict.fromkeys(("ntp", "nitp", "mtp", "stock"), 3),
        "ntp@2": 2,
    }
    block = parts_of_shape(FLAVORS["debug_moe"].shape).blocks[-1].params()
    assert variants["ntp"]["parameters"] - variants["ntp@2"]["parameters"] == block
    assert variants["stock"]["first_loss"] == pytest.approx(variants["ntp"]["first_loss"], rel=1e-2)  # bf16 experts
    assert variants["stock"]["notes"] == ["TorchTitan's experts compute in bfloat16 all the same"]
    assert variants["ntp"]["notes"] == []
    assert "extrapolation" in found
    assert found["extrapolation"].get("full_layers", 4) == 4


def test_a_target_beyond_the_slice_is_moved(tmp_path, monkeypatch):
    loaded = []
    real = throughput.load_entry
    monkeypatch.setattr(throughput, "load_entry", lambda *a, **k: loaded.append(real(*a, **k)) or loaded[-1])
    words = ["--config", "train_configs/nitp_9b-a1b.toml", "--variants", "ntp,nitp", "--depths", "4,2"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    entries, full = throughput.load_entries(*throughput.parse(words), str(tmp_path))
    assert full == 24
    assert [(e.name, e.layers, e.job.nitp.target_layer_of(e.layers)) for e in entries] == [
        ("ntp", 4, 1),
        ("nitp", 4, 1),
        ("ntp@2", 2, 1),
    ]
    assert all(e.job.shape.num_experts == 144 for e in entries)


def test_steps_are_alone_and_small_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: True)  # where CUDA graphs would be the default

    def job_of(*words: str):
        return load_entry(
            "train_configs/nitp_0.5b.toml", words, VARIANTS["nitp"], world_size=1, dump_folder=tmp_path
        ).job

    job = job_of()
    assert not job["checkpoint"]["enable"]
    assert job.nitp.geometry_freq == 0
    assert job["training"]["disable_cuda_graphs"]
    assert job["training"]["global_batch_size"] == job["training"]["local_batch_size"] == 8
    assert (job["compile"]["enable"], job["training"]["mixed_precision_param"]) == (True, "bfloat16")
    assert job_of("--training.global_batch_size=32")["training"]["global_batch_size"] == 32
    assert not job_of("--training.disable_cuda_graphs=false")["training"]["disable_cuda_graphs"]


def test_a_turn_is_training(tmp_path):
    """The loop's own steps: the weights after some turns are those of a run of as many steps."""
    words = [*TINY, "--training.steps=4"]
    entry = load_entry("train_configs/debug.toml", words, VARIANTS["nitp"], world_size=1, dump_folder=tmp_path)
    with running(trainer_config(entry, Data(mean_document=20))) as trainer:
        trainer.train()
        expected = {name: p.detach().full_tensor().clone() for name, p in trainer.model_parts[0].named_parameters()}
        contestant = Contestant(trainer_config(entry, Data(mean_document=20)))
        contestant.logged_loss()
        contestant.release()
        assert all(p.grad is None for p in contestant.trainer.model_parts[0].parameters())
        contestant.run(3)
        assert contestant.trainer.step == trainer.step == 4
        for name, p in contestant.trainer.model_parts[0].named_parameters():
            assert p.full_tensor().equal(expected[name]), name
        contestant.close()


def test_a_variant_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """One cannot be built; another fails in its first turn, for want of memory beside the others, say."""
    real = jobs.trainer_config

    def failing(entry, data):
        if entry.name == "mtp":
            raise RuntimeError("out of something")
        config = real(entry, data)
        if entry.name == "stock":
            config.dump_folder = "fails"
        return config

    closed = []

    class Failing(Contestant):
        turns = 0

        def close(self) -> None:
            closed.append(self.trainer.config.dump_folder)
            super().close()

        def run(self, steps: int) -> None:
            self.turns += 1
            # The first step, the rest of the warm-up, a turn's steps before the timed ones, these.
            if self.trainer.config.dump_folder == "fails" and self.turns > 3:
                raise torch.OutOfMemoryError("no room")
            super().run(steps)

    monkeypatch.setattr(jobs, "trainer_config", failing)
    monkeypatch.setattr(race, "Contestant", Failing)
    found = run(tmp_path, "debug", "--variants", "ntp,mtp,stock,nitp", code=1)
    assert list(found["variants"]) == ["ntp", "nitp"]
    assert found["rounds"] == 3
    assert found["failed"] == {"mtp": "RuntimeError: out of something", "stock": "OutOfMemoryError: no room"}
    assert "mtp failed: RuntimeError" in capsys.readouterr().out
    # It is ended when it drops out, the others at the end.
    assert closed[0] == "fails"
    assert len(closed) == 3


def test_every_round_is_written(tmp_path, monkeypatch):
    rounds = []
    real = throughput.results.write
    monkeypatch.setattr(
        throughput.results, "write", lambda path, result: (rounds.append(result["rounds"]), real(path, result))
    )
    run(tmp_path, "debug", "--variants", "ntp")
    assert rounds == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "ntp,nipt"], "found 'nipt', expected one of ntp, nitp"),
        (["--variant", "x:float9.recipe=tensorwise"], 'unknown table "float9"'),
        (["--training.seq_lenn", "3"], 'did you mean "--training.seq_len"?'),
        (["--depths", "7,2"], "expected two numbers of layers or more, up to 6"),
        (["--out", "/dev/null/x.json"], "--out: /dev/null/x.json cannot be written"),
        (["--depths", "2"], "expected two numbers of layers or more"),
        (["--depths", "3,2", "--variants", "nitp"], "expected ntp among the variants"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(arguments, message, capsys):
    assert throughput.main(["--config", "train_configs/debug.toml", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_several_ranks(tmp_path):
    out = tmp_path / "x.json"
    words = [
        "--config",
        "train_configs/debug.toml",
        "--variants",
        "ntp,nitp,mtp",
        "--device",
        "cpu",
        *SHORT,
        *TINY,
        "--repeats",
        "1",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "benchmarks.throughput"]
    done = subprocess.run(
        [*command, *words, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["ranks"] == 2
    assert found["tokens_per_step"] == 2 * 64
    assert done.stdout.count("over ntp") == 1  # one rank speaks
    assert found["variants"]["mtp"]["parameters"] > found["variants"]["nitp"]["parameters"]
