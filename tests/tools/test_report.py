"""``nitp-titan report``: its keys, its jobs, models that are not ours, and the lines of ``nitp-titan check``."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nitp_titan.job import load_job
from nitp_titan.models.costs import flops, mtp_flops, parts_of_shape
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.models.registry import decoder_config
from nitp_titan.nitp.config import CHUNK_TOKENS
from nitp_titan.runtime import machine
from nitp_titan.tools.estimate.parts import parts_of_config
from nitp_titan.tools.report import render, report, summary
from tests.helpers.commands import cli_main
from tests.helpers.decoders import backbone

ROOT = Path(__file__).resolve().parent.parent.parent
KEYS = {
    "flavor", "changes", "model", "ngpu",
    "total_params", "active_params", "params", "projector_params", "flops_per_token",
    "nitp_flops_per_token", "nitp_overhead_percent", "mtp_overhead_percent", "memory_gib", "fits_80gb",
}  # fmt: skip
WAYS = {"paper", "exact", "with_attention"}
MEMORY = {
    "weights", "gradients", "optimizer_states", "projector", "gathered_parameters", "gradient_reduction",
    "activations", "block_backward", "saved_target", "nitp_loss", "cross_entropy", "total",
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_json_of_9b_is_the_papers(capsys):
    code, out, error = cli_main(capsys, "report", "9B-A1B", "--ngpu", "8", "--json")
    assert (code, error) == (0, "")
    found = json.loads(out)
    assert set(found) == KEYS
    for key in ("flops_per_token", "nitp_overhead_percent", "mtp_overhead_percent"):
        assert set(found[key]) == WAYS
    assert set(found["memory_gib"]) == MEMORY
    assert (found["flavor"], found["ngpu"], found["fits_80gb"]) == ("9B-A1B", 8, True)
    assert found["total_params"] == sum(found["params"].values()) == pytest.approx(8.75e9, rel=5e-3)
    assert found["active_params"] == pytest.approx(1.062e9, rel=5e-3)
    assert found["projector_params"] == 12 * 1280**2
    assert found["flops_per_token"]["paper"] == pytest.approx(5.06e9, rel=5e-3)
    assert found["nitp_flops_per_token"] == pytest.approx(1.18e8, rel=5e-3)
    assert found["nitp_overhead_percent"]["paper"] == pytest.approx(2.3, abs=0.05)
    for way, percent in found["nitp_overhead_percent"].items():
        base = found["flops_per_token"][way]
        assert percent == pytest.approx(100 * found["nitp_flops_per_token"] / base)
        assert found["mtp_overhead_percent"][way] > percent
    memory = found["memory_gib"]
    assert memory["total"] == pytest.approx(sum(size for name, size in memory.items() if name != "total"))


@pytest.mark.parametrize("name", FLAVORS)
def test_every_flavor_has_a_report_for_people(name):
    costs = report(name, [], 8)
    text = render(costs)
    assert text.startswith(f"{name} on 8 ranks\n")
    assert ("fits a GPU" in text, "does not fit" in text) == (True, False) or not costs["fits_80gb"]
    assert max(map(len, text.splitlines())) <= 100


def test_numbers_are_readable(capsys):
    out = cli_main(capsys, "report", "9B-A1B", "--ngpu", "8")[1]
    rows = {" ".join(line.split()[:2]): line for line in out.splitlines()}
    assert rows["total 8.75B"]
    assert "1.06B" in rows["active on"]
    assert "5.06 GFLOPs" in rows["model 5.06"]
    assert "118 MFLOPs" in out
    assert "2.3 %" in out
    assert "unembedding 195M" in rows
    assert cli_main(capsys, "report", "debug")[1].startswith("debug on 1 rank\n")


def test_a_file_and_its_overrides_are_what_is_reported(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('[model]\nflavor = "9B-A1B"\n[nitp]\nprojector_ratio = 2\n[training]\nlocal_batch_size = 1\n')
    flavor, file = report("9B-A1B", [], 8), report(str(path), [], 8)
    assert file["flavor"] == "9B-A1B"
    assert file["total_params"] == flavor["total_params"]
    assert file["projector_params"] == flavor["projector_params"] / 2
    assert file["memory_gib"]["activations"] == flavor["memory_gib"]["activations"] / 2
    off = report(str(path), ["--nitp.no-enable"], 8)
    assert (off["projector_params"], off["nitp_flops_per_token"]) == (0, 0)
    assert off["nitp_overhead_percent"] == dict.fromkeys(WAYS, 0)
    assert off["flops_per_token"] == flavor["flops_per_token"]
    assert "NITP's projector" not in render(off)
    short = report(str(path), ["--training.seq_len", "4096"], 8)
    attention = {n: c["flops_per_token"]["with_attention"] - c["flops_per_token"]["exact"] for n, c in
                 (("long", file), ("short", short))}  # fmt: skip
    assert attention["short"] == attention["long"] / 2


def test_changes_of_the_shape_are_counted():
    changed = ["--model.shape.n_layers", "3", "--model.shape.num_experts", "6", "--model.shape.tie_embeddings"]
    found = report("debug_moe", changed, 1)
    attention = 128 * (128 + 64 + 64) + 128 * 128
    expert = 3 * 128 * 128
    assert found["params"] == {
        "embedding": 320 * 128,
        "unembedding": 0,
        "attention": 3 * attention,
        "feed_forward": 3 * 128 * 384,
        "router": 2 * 128 * 6,
        "routed_experts": 2 * 6 * expert,
        "shared_experts": 2 * expert,
        "norms": 7 * 128,
    }
    assert found["active_params"] == found["total_params"] - 2 * 4 * expert
    assert found["changes"] == {"n_layers": 3, "num_experts": 6, "tie_embeddings": True}
    text = render(found)
    assert text.startswith("debug_moe with n_layers = 3, tie_embeddings = true, num_experts = 6 (changed) on 1 rank\n")
    rows = [line.split(maxsplit=1) for line in text.splitlines() if line]
    assert ["blocks", "3"] in rows
    assert ["widths", "model 128, feed-forward 384, an expert 128"] in rows
    assert ["heads", "4, 2 key-value, head dim 32"] in rows
    assert ["embeddings", "320 x 128, tied"] in rows
    assert "NITP's target             block 1 of 3 (a fifth of the depth)" in text
    assert report("debug_moe", ["--model.shape.n_layers=4"], 1)["changes"] == {}
    assert "NITP's target             -" in render(report("debug_moe", ["--nitp.no-enable"], 1))


def test_layout_precision_and_checkpointing_of_the_job_count(monkeypatch):
    def memory(*overrides: str, flavor: str = "2B", ngpu: int = 8) -> dict[str, float]:
        return report(flavor, list(overrides), ngpu)["memory_gib"]

    usual = memory()
    assert memory(ngpu=16)["weights"] == pytest.approx(usual["weights"] / 2)
    replicated = ["--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "4"]
    assert memory(*replicated)["weights"] == pytest.approx(usual["weights"] * 2)
    assert memory("--parallelism.tensor_parallel_degree", "2")["saved_target"] == usual["saved_target"] == 0
    full = memory("--activation_checkpoint.mode", "full")
    none = memory("--activation_checkpoint.mode", "none")
    assert full["activations"] < usual["activations"] < none["activations"]
    assert full["total"] < usual["total"] < none["total"]
    # What the job asks for counts; what only this machine would take for lack of a GPU does not.
    wide = memory("--training.mixed_precision_param", "float32")
    assert wide["gathered_parameters"] == 2 * usual["gathered_parameters"]
    assert memory("--training.mixed_precision_param", "bfloat16") == usual
    assert memory("--training.dtype", "bfloat16")["weights"] == usual["weights"] / 2
    bf16_states = memory("--optimizer.implementation", "fused_opt_states_bf16")
    assert bf16_states["optimizer_states"] == usual["optimizer_states"] / 2
    logits = CHUNK_TOKENS * 152_064 * 12 / 2**30
    weight, hidden = 152_064 * 1792 * 4 / 2**30, 4 * 8192 * 1792 * 2 / 2**30
    assert usual["cross_entropy"] == pytest.approx(logits + weight + hidden)
    assert memory("--loss.chunk_tokens", "2048")["cross_entropy"] == pytest.approx(logits / 2 + weight + hidden)
    assert memory("--loss.implementation", "reference")["cross_entropy"] == pytest.approx(logits)
    two = memory("--parallelism.tensor_parallel_degree", "2")
    assert two["cross_entropy"] == pytest.approx((logits + weight) / 2 + hidden)
    assert memory("--training.enable_cpu_offload")["weights"] == 0
    assert memory("--parallelism.fsdp_reshard_after_forward", "never")["gathered_parameters"] > 3
    # Without NITP the logits of all tokens, or of one in num_chunks.
    plain = memory("--nitp.no-enable", "--loss.name", "cross_entropy")
    assert plain["cross_entropy"] == pytest.approx(logits * 4 * 8192 / CHUNK_TOKENS)
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 13))
    chunked = memory("--nitp.no-enable", "--loss.num_chunks", "8")
    assert chunked["cross_entropy"] == pytest.approx(logits)


def test_what_does_not_fit_says_so(capsys):
    found = report("45B-A5.5B", [], 8)
    assert not found["fits_80gb"]
    assert found["memory_gib"]["total"] > 74.5
    assert "does not fit a GPU of 80 GB" in render(found)
    assert report("45B-A5.5B", [], 64)["fits_80gb"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("9B-A1", 'no such flavor or file; did you mean "9B-A1B"?'),
        ("debug_mo", 'no such flavor or file; did you mean "debug_moe"?'),
        ("debgu.toml", 'no such flavor or file; did you mean "train_configs/debug.toml"?'),
        ("train_configs/debgu.toml", 'no such file; did you mean "train_configs/debug.toml"?'),
        ("what", "no such flavor or file; the flavors are debug, debug_moe, 0.5B"),
    ],
)
def test_unknown_names_are_one_line_with_the_nearest(capsys, name, hint):
    code, out, error = cli_main(capsys, "report", name)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"{name}: {hint}")


def test_a_bad_job_is_refused(capsys, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('[model]\nflavor = "debug"\n[nitp]\nweight = nan\n')
    code, out, error = cli_main(capsys, "report", str(path))
    assert (code, out) == (2, "")
    assert error.startswith(f"{path}:4: [nitp] weight: found nan")
    code, _, error = cli_main(capsys, "report", "debug", "--training.stepss", "3")
    assert code == 2
    assert "--training.stepss" in error
    assert cli_main(capsys, "report", "debug", "--ngpu", "0")[0] == 2
    assert cli_main(capsys, "report")[0] == 2
    code, out, _ = cli_main(capsys, "report", "--help")
    assert code == 0
    assert "nitp-titan report FLAVOR|FILE" in out


def test_world_size_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert json.loads(cli_main(capsys, "report", "debug", "--json")[1])["ngpu"] == 4
    assert json.loads(cli_main(capsys, "report", "debug", "--json", "--ngpu", "2")[1])["ngpu"] == 2
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert cli_main(capsys, "report", "debug")[2] == "WORLD_SIZE: found 'two', expected a whole number, 1..10000000\n"


def test_it_is_instant_and_without_torch():
    code = "import sys; from nitp_titan.cli.main import main; main(); assert 'torch' not in sys.modules"
    begin = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", code, "report", "45B-A5.5B", "--ngpu", "64"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (process.returncode, process.stderr) == (0, "")
    # Under a second alone; the suite keeps every core busy.
    assert time.perf_counter() - begin < 5


# --- models that are not ours


@pytest.mark.parametrize("name", ["debug", "debug_moe"])
def test_counting_by_name_gives_what_the_shape_gives(name):
    shape = FLAVORS[name].shape
    by_name, by_shape = parts_of_config(decoder_config(shape)), parts_of_shape(shape)
    assert by_name.by_part() == by_shape.by_part()
    assert by_name.blocks == by_shape.blocks
    exact = {key: count for key, count in flops(by_shape, 99).items() if key != "paper"}
    assert flops(by_name, 99) == {"paper": None, **exact}


@pytest.mark.parametrize(
    ("module", "flavor"),
    [
        ("llama3", "debugmodel"),
        ("llama3", "8B"),
        ("qwen3", "0.6B"),
        ("qwen3", "debugmodel"),
        ("qwen3", "debugmodel_moe"),
        ("deepseek_v3", "debugmodel"),
        ("deepseek_v3", "16B"),
        ("gpt_oss", "debugmodel"),
    ],
)
def test_upstream_models_agree_with_upstreams_own_counts(module, flavor):
    logging.disable(logging.INFO)
    config = backbone(module, flavor).model
    with torch.device("meta"):
        model = config.build()
    params, upstream = config.get_nparams_and_flops(model, 2048)
    logging.disable(logging.NOTSET)
    parts = parts_of_config(config)
    assert parts.total() == params == sum(p.numel() for p in model.parameters())
    found = flops(parts, 2048)
    # Upstream takes norms and biases for matrices.
    vectors = 6 * parts.by_part()["norms"]
    assert found["paper"] is None
    assert upstream - vectors <= found["with_attention"] <= upstream


def test_widths_and_biases_of_upstream_models_are_found():
    [*_, llama] = parts_of_config(backbone("llama3", "debugmodel").model).blocks
    assert (llama.heads, llama.query, llama.key, llama.value, llama.attended) == (16, 256, 256, 256, 256)
    config = backbone("gpt_oss", "debugmodel").model
    moe = config.layers[-1].moe
    [*_, gpt_oss] = parts_of_config(config).blocks
    width = moe.routed_experts.inner_experts.hidden_dim
    assert gpt_oss.routed_experts == 3 * moe.num_experts * config.dim * width
    assert gpt_oss.norms > moe.num_experts * (2 * width + config.dim)


def test_what_mtp_would_add_is_what_upstreams_mtp_adds():
    from torchtitan.models.deepseek_v3 import model_registry

    plain, mtp = (parts_of_config(model_registry("debugmodel", num_mtp_layers=n).model) for n in (0, 1))
    assert len(mtp.blocks) == len(plain.blocks) + 1
    added = mtp_flops(plain, 512)
    for way in ("exact", "with_attention"):
        # The head's own unembedding is the model's.
        found = flops(mtp, 512)[way] - flops(plain, 512)[way] + 6 * plain.vocab_size * plain.dim
        assert found == added[way]


def test_report_of_an_upstream_model():
    found = report("train_configs/debug.toml", ["--model.module", "llama3", "--model.flavor", "8B"], 8)
    assert set(found) == KEYS
    assert (found["flavor"], found["total_params"]) == ("8B", 8_030_261_248)
    assert found["flops_per_token"]["paper"] is found["nitp_overhead_percent"]["paper"] is None
    assert found["mtp_overhead_percent"]["paper"] is None
    assert found["nitp_overhead_percent"]["exact"] == pytest.approx(2.7, abs=0.1)
    assert found["memory_gib"]["weights"] == pytest.approx(8.03e9 * 4 / 8 / 2**30, rel=1e-3)
    assert "8.03B" in render(found)


def test_a_model_that_cannot_be_imported_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtitan.models.llama3", None)
    overrides = ["--model.module", "llama3", "--model.flavor", "8B"]
    code, out, error = cli_main(capsys, "report", "train_configs/debug.toml", *overrides)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("train_configs/debug.toml: [model] module: llama3 8B cannot be built: ")


def test_pipelines_have_no_estimate(monkeypatch):
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 14))
    overrides = ["--nitp.no-enable", "--parallelism.pipeline_parallel_degree", "2"]
    overrides += ["--model.shape.no-tie_embeddings", "--training.disable_cuda_graphs"]
    found = report("0.5B", overrides, 2)
    assert found["memory_gib"] is found["fits_80gb"] is None
    assert "not estimated" in render(found)


# --- the lines of nitp-titan check


def test_summary():
    memory, cost, fits = summary(load_job(None, ["--model.flavor", "9B-A1B"], 8))
    total = report("9B-A1B", [], 8)["memory_gib"]["total"]
    assert memory == f"about {total:.1f} GiB a rank: fits a GPU of 80 GB (74.5 GiB)"
    assert cost == ("+118 MFLOPs a token, 2.3 % (the paper's formula), 1.4 % with attention; MTP-1 would be 18.0 %")
    assert fits is True
    large = summary(load_job(None, ["--model.flavor", "45B-A5.5B"], 8))
    assert "does not fit" in large.memory
    assert large.fits is False
    assert summary(load_job(None, ["--model.flavor", "9B-A1B", "--nitp.no-enable"], 8))[1] == ""
    stock = ["--model.module", "llama3", "--model.flavor", "8B"]
    assert summary(load_job("train_configs/debug.toml", stock, 8)) == ("", "", None)
