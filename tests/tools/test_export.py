"""A training checkpoint as a Hugging Face folder: what transformers computes with it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, GenerationConfig

from nitp_titan.models.flavors import FLAVORS
from nitp_titan.tools.export import folder as export_module
from nitp_titan.tools.export.folder import export
from tests.helpers.exports import EOS, check_same, job_of, loaded, names_in, refusal, shrunken, trained

ARCHITECTURES = {"debug": "Llama", "0.5B": "Llama", "2B": "Llama", "3B": "Llama"}


@pytest.mark.parametrize("flavor", FLAVORS)
def test_transformers_computes_what_every_flavor_does(flavor, tmp_path):
    job = shrunken(flavor)
    ours = trained(job, tmp_path / "step-3")
    export(tmp_path / "step-3", tmp_path / "out", job)
    theirs = loaded(tmp_path / "out")
    assert type(theirs).__name__ == f"{ARCHITECTURES.get(flavor, 'Ernie4_5_Moe')}ForCausalLM"
    assert theirs.config.tie_word_embeddings == FLAVORS[flavor].shape.tie_embeddings
    check_same(ours, theirs, 512)
    assert not any("projector" in key for key in load_file(tmp_path / "out" / "model.safetensors"))


SHAPES = {
    "tied experts": ("debug_moe", {"tie_embeddings": True}),
    "wide shared experts": ("debug_moe", {"num_shared_experts": 3}),
    "no shared experts": ("debug_moe", {"num_shared_experts": 0}),
    "no dense blocks": ("debug_moe", {"n_dense_layers": 0}),
    "dense blocks": ("debug_moe", {"n_dense_layers": 2}),
    "one expert a token": ("debug_moe", {"top_k": 1}),
    "one key-value head": ("debug_moe", {"n_kv_heads": 1}),
    "heads narrower than the model": ("debug", {"head_dim": 16}),
    "heads wider than the model": ("debug", {"head_dim": 64}),
    "no groups of heads": ("debug", {"n_kv_heads": 4}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_what_other_shapes_do(name, tmp_path):
    flavor, changes = SHAPES[name]
    words = [f"--model.shape.{key}={str(value).lower()}" for key, value in changes.items()]
    job = shrunken(flavor, *words)
    ours = trained(job, tmp_path / "step-3")
    export(tmp_path / "step-3", tmp_path / "out", job)
    check_same(ours, loaded(tmp_path / "out"), 512)


FOREIGN = {
    ("llama3", "debugmodel"): "LlamaForCausalLM",
    ("qwen3", "debugmodel"): "Qwen3ForCausalLM",
    ("tests.helpers.foreign", "qwen3_moe"): "Qwen3MoeForCausalLM",
    ("tests.helpers.foreign", "deepseek_v3"): "DeepseekV3ForCausalLM",
}


@pytest.mark.parametrize(("module", "flavor"), FOREIGN)
def test_transformers_computes_what_wrapped_models_do(module, flavor, tmp_path):
    job = job_of(f"--model.module={module}", f"--model.flavor={flavor}", "--training.seq_len=256")
    ours = trained(job, tmp_path / "step-3", bias=flavor == "deepseek_v3")
    export(tmp_path / "step-3", tmp_path / "out", job)
    theirs = loaded(tmp_path / "out")
    assert type(theirs).__name__ == FOREIGN[module, flavor]
    # The norms of DeepSeek-V3's latents have another epsilon in transformers.
    check_same(ours, theirs, ours.config.vocab_size, within=1e-4 if flavor == "deepseek_v3" else 1e-5)


@pytest.mark.parametrize("flavor", ["debug", "debug_moe"])
def test_special_tokens_are_the_tokenizers(flavor, tmp_path):
    job = shrunken(flavor)
    trained(job, tmp_path / "step-3")
    export(tmp_path / "step-3", tmp_path / "out", job)
    assert names_in(tmp_path / "out") == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = loaded(tmp_path / "out")
    # Not those that transformers has for the architecture; Ernie's would keep an embedding row at zero.
    for config, pad in ((model.config, None), (GenerationConfig.from_pretrained(tmp_path / "out"), EOS)):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, EOS, pad)
    # A batch of texts needs a padding token.
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(["a", "bcd"], padding=True)
    assert batch["input_ids"] == [[256, 97, EOS, EOS], [256, 98, 99, 100]]
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_a_tokenizer_of_hugging_face_goes_along(tmp_path):
    assets = tmp_path / "assets"
    assets.mkdir()
    words = ["--tokenizer.name=huggingface", f"--model.hf_assets_path={assets}"]
    job = shrunken("debug", *words)
    trained(job, tmp_path / "step-3")
    assert "model.hf_assets_path: no tokenizer to copy: '" in refusal(tmp_path / "step-3", tmp_path / "out", job)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2, "?": 3}, unk_token="?"))
    tokenizer.save(str(assets / "tokenizer.json"))
    (assets / "tokenizer_config.json").write_text(
        '{"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    export(tmp_path / "step-3", tmp_path / "out", job)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("b")["input_ids"] == [1]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_a_dtype_can_be_chosen(tmp_path):
    job = shrunken("debug_moe")
    trained(job, tmp_path / "step-3")
    export(tmp_path / "step-3", tmp_path / "kept", job)
    export(tmp_path / "step-3", tmp_path / "out", job, "bfloat16")
    assert loaded(tmp_path / "kept").dtype == torch.float32
    assert loaded(tmp_path / "out").dtype == torch.bfloat16
    kept, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "out"))
    router = {name for name in rounded if rounded[name].dtype == torch.float32}
    # As transformers keeps them at any dtype.
    assert router == {name for name in kept if name.endswith(("mlp.gate.weight", "e_score_correction_bias"))} != set()
    assert all(torch.equal(kept[name].to(rounded[name].dtype), rounded[name]) for name in kept)


def test_the_dtype_is_the_checkpoints(tmp_path):
    job = shrunken("debug")
    trained(job, tmp_path / "step-3", dtype=torch.bfloat16)
    export(tmp_path / "step-3", tmp_path / "out", job)
    assert loaded(tmp_path / "out").dtype == torch.bfloat16
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_large_model_is_several_files_with_an_index(tmp_path, monkeypatch):
    job = shrunken("3B-A0.5B")
    ours = trained(job, tmp_path / "step-3")
    export(tmp_path / "step-3", tmp_path / "one", job)
    # Less than the experts of a block, which go to several files then.
    monkeypatch.setattr(export_module, "SHARD_SIZE", "400KB")
    export(tmp_path / "step-3", tmp_path / "many", job)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert len(set(index["weight_map"].values())) > 5
    for file in set(index["weight_map"].values()):
        assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(tmp_path / "many" / file).items())
    check_same(ours, loaded(tmp_path / "many"), 512)


def test_a_run_without_nitp_is_exported_too(tmp_path):
    job = shrunken("debug", "--nitp.no-enable")
    ours = trained(job, tmp_path / "step-3")
    assert not hasattr(ours, "projector")
    export(tmp_path / "step-3", tmp_path / "out", job)
    check_same(ours, loaded(tmp_path / "out"), 512)


@pytest.mark.parametrize("flavor", ["debug", "debug_moe"])
def test_transformers_4_finds_the_rotary_base(flavor, tmp_path):
    job = shrunken(flavor)
    trained(job, tmp_path / "step-3")
    export(tmp_path / "step-3", tmp_path / "out", job)
    # It reads no rope_parameters, and has another base for Ernie.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 700.0
