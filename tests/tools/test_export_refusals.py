"""Which checkpoint is exported, and what is refused: nothing half written stays."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nitp_titan.tools.export import folder as export_module
from nitp_titan.tools.export.folder import export
from tests.helpers.exports import job_of, names_in, refusal, shrunken, trained


def test_the_latest_complete_step_is_taken(tmp_path):
    job, steps = shrunken("debug"), tmp_path / "run" / "checkpoint"
    for step in (9, 10):
        trained(job, steps / f"step-{step}")
    (steps / "step-11").mkdir()
    (steps / "step-11" / "__0_0.distcp").write_bytes(b"half")
    for given in (tmp_path / "run", steps):
        assert export_module.find_checkpoint(given) == steps / "step-10"
    assert export_module.find_checkpoint(steps / "step-9") == steps / "step-9"
    message = refusal(steps / "step-11", tmp_path / "out", job)
    assert "step-11 is incomplete: it has no .metadata" in message
    assert "complete beside it: step-9, step-10" in message
    (steps / "step-11" / "model.safetensors").touch()
    assert "Hugging Face format already" in refusal(steps / "step-11", tmp_path / "out", job)
    assert "is not a folder" in refusal(tmp_path / "nowhere", tmp_path / "out", job)
    (tmp_path / "empty").mkdir()
    assert "no complete checkpoint: no step-N" in refusal(tmp_path / "empty", tmp_path / "out", job)
    assert names_in(tmp_path) == ["empty", "run"]


def test_another_models_checkpoint_is_refused_by_name(tmp_path):
    trained(shrunken("debug_moe"), tmp_path / "step-3")
    problems = refusal(tmp_path / "step-3", tmp_path / "out", shrunken("debug_moe", "--model.shape.n_layers=4"))
    assert "lacks tensors for the job's model: layers.3.attention.qkv_linear.w" in problems
    assert "more" in problems
    problems = refusal(tmp_path / "step-3", tmp_path / "out", shrunken("debug_moe", "--model.shape.n_layers=2"))
    assert "has tensors too many for the job's model: layers.2.attention.qkv_linear.w" in problems
    problems = refusal(tmp_path / "step-3", tmp_path / "out", shrunken("debug_moe", "--model.shape.hidden_dim=100"))
    assert "of other sizes for the job's model: layers.0.feed_forward.w1.weight 96x128, not 100x128" in problems
    assert names_in(tmp_path) == ["step-3"]


def test_a_folder_with_contents_is_left_alone(tmp_path):
    job = shrunken("debug")
    trained(job, tmp_path / "step-3")
    (tmp_path / "out").mkdir()
    export(tmp_path / "step-3", tmp_path / "out", job)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert "out exists already" in refusal(tmp_path / "step-3", tmp_path / "out", job)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


UNMAPPABLE = {
    ("nitp_titan", "debug_moe", "--model.shape.router_score_func=sigmoid"): (
        'Ernie4_5_MoeForCausalLM needs a softmax router, found router_score_func = "sigmoid"'
    ),
    ("nitp_titan", "debug_moe", "--model.shape.no-router_norm"): "add up to 1, found router_norm = false",
    ("nitp_titan", "debug", "--model.shape.n_heads=6"): "dim a multiple of n_heads, found 128 and 6",
    ("deepseek_v3", "debugmodel"): "DeepseekV3ForCausalLM needs a sigmoid router",
    ("gpt_oss", "debugmodel"): "no stock architecture of transformers is known for GptOssModel.Config",
}


@pytest.mark.parametrize(("module", "flavor", "words"), [(*key[:2], key[2:]) for key in UNMAPPABLE])
def test_what_transformers_cannot_compute_is_refused(module, flavor, words, tmp_path):
    job = job_of(f"--model.module={module}", f"--model.flavor={flavor}", "--training.seq_len=256", *words)
    # A checkpoint is not even looked for, and all problems are named.
    problems = refusal(tmp_path / "nowhere", tmp_path / "out", job).splitlines()
    assert any(UNMAPPABLE[module, flavor, *words] in problem for problem in problems)
    assert any("nowhere is not a folder" in problem for problem in problems)
    assert names_in(tmp_path) == []


def test_a_selection_bias_without_a_place_is_refused(tmp_path):
    job = job_of("--model.module=tests.helpers.foreign", "--model.flavor=qwen3_moe", "--training.seq_len=256")
    trained(job, tmp_path / "step-3")
    message = refusal(tmp_path / "step-3", tmp_path / "out", job)
    assert "Qwen3MoeForCausalLM has no place for what is not zero: layers.0.moe.expert_bias_E" in message
    assert names_in(tmp_path) == ["step-3"]


def test_values_beyond_the_dtype_are_refused(tmp_path):
    job = shrunken("debug")
    model = trained(job, tmp_path / "unused")
    weights = model.state_dict() | {"layers.1.feed_forward.w2.weight": torch.full((128, 96), 7e4)}
    dcp.save(weights, checkpoint_id=tmp_path / "step-3", no_dist=True)
    message = refusal(tmp_path / "step-3", tmp_path / "out", job, "float16")
    assert "layers.1.feed_forward.w2.weight of" in message
    assert "is not finite in torch.float16" in message
    assert names_in(tmp_path) == ["step-3", "unused"]


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    job = shrunken("debug")
    trained(job, tmp_path / "step-3")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(tmp_path / "step-3", tmp_path / "out", job)
    assert names_in(tmp_path) == ["step-3"]
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(tmp_path / "step-3", tmp_path / "file" / "out", job)
    data = tmp_path / "step-3" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    assert "step-3 cannot be read" in refusal(tmp_path / "step-3", tmp_path / "out", job)
    (tmp_path / "step-3" / ".metadata").write_bytes(b"")
    assert "step-3 cannot be read" in refusal(tmp_path / "step-3", tmp_path / "out", job)
    assert names_in(tmp_path) == ["file", "step-3"]
