"""A training checkpoint as a Hugging Face folder: what transformers computes with it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nitp_titan import export as export_module
from nitp_titan.cli import main
from nitp_titan.decoder import nitp_model_spec
from nitp_titan.export import ExportError, export
from nitp_titan.job import Job, load_job
from nitp_titan.job.build import model_spec
from nitp_titan.job.shape import changes_of
from nitp_titan.models.flavors import FLAVORS
from tests.decoders import built
from tests.test_train import call, debug_job

EOS = 257


def job_of(*words: str) -> Job:
    """A job with the byte tokenizer and NITP at the first block."""
    common = ["--tokenizer.name=byte", "--dataloader.dataset=python_stdlib", "--nitp.target_layer=1"]
    return load_job(None, [*common, *words], 1)


def shrunken(flavor: str, *words: str) -> Job:
    """A flavor's twin: its depth pattern, head dims and tying, with few blocks, heads, experts and tokens."""
    shape = FLAVORS[flavor].shape
    small = {"n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "dim": 4 * shape.head_dim, "hidden_dim": 96}
    # An epsilon and a base that are nobody's defaults show in the logits.
    small |= {"vocab_size": 512, "norm_eps": 1e-2, "rope_theta": 700.0}
    if shape.num_experts:
        small |= {"num_experts": 8, "top_k": 3, "expert_hidden_dim": 48}
    changes = [f"--model.shape.{key}={value}" for key, value in small.items()]
    return job_of(f"--model.flavor={flavor}", *changes, "--training.seq_len=256", *words)


def trained(job: Job, folder: Path, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Save a checkpoint of the job's NITP twin with random weights, as training does; return the twin.

    Args:
        bias: random selection biases, rather than zero.
    """
    table = job["model"]
    spec = model_spec(table["module"], table["flavor"], "flex", **changes_of(job["model.shape"]))
    model = built(nitp_model_spec(spec, job.nitp))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.endswith("expert_bias_E"):
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator) * bias
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter += 0.3 * noise
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    optimizer = {"state": {"lm_head.weight.exp_avg": torch.zeros(3)}}
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    dcp.save({**weights, "optimizer": optimizer, "train_state": {"step": 3}}, checkpoint_id=folder, no_dist=True)
    return model.eval()


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Of the backbone: (B, L) -> (B, L, V)."""
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.no_grad():
        return model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions))


def greedy(model: torch.nn.Module, tokens: torch.Tensor, steps: int) -> list[int]:
    for _ in range(steps):
        tokens = torch.cat([tokens, logits_of(model, tokens)[:, -1:].argmax(-1)], dim=1)
        if tokens[0, -1] == EOS:
            break
    return tokens[0].tolist()


def loaded(folder: Path, **options) -> torch.nn.Module:
    """What transformers loads: every key, and no other."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def check_same(ours: torch.nn.Module, theirs: torch.nn.Module, vocab_size: int, within: float = 1e-5) -> None:
    tokens = torch.randint(vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    expected = logits_of(ours, tokens)
    with torch.no_grad():
        found = theirs(input_ids=tokens).logits
    assert found.dtype == expected.dtype
    assert expected.std() > 0.1
    print("REL", ((found - expected).abs().max() / expected.abs().max()).item())
    assert (found - expected).abs().max() < within * expected.abs().max()
    prompt = tokens[:1, :9]
    continued = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8)
    assert continued[0].tolist() == greedy(ours, prompt, 8)


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
    ("tests.foreign", "qwen3_moe"): "Qwen3MoeForCausalLM",
    ("tests.foreign", "deepseek_v3"): "DeepseekV3ForCausalLM",
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
    for config in (model.config, GenerationConfig.from_pretrained(tmp_path / "out")):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, EOS, None)
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_a_tokenizer_of_hugging_face_goes_along(tmp_path):
    assets = tmp_path / "assets"
    assets.mkdir()
    words = ["--tokenizer.name=huggingface", f"--model.hf_assets_path={assets}"]
    job = shrunken("debug", *words)
    trained(job, tmp_path / "step-3")
    assert "model.hf_assets_path: no tokenizer to copy: No supported tokenizer files" in refusal(
        tmp_path / "step-3", tmp_path / "out", job
    )
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


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(*arguments, **options) -> str:
    with pytest.raises(ExportError) as caught:
        export(*arguments, **options)
    return str(caught.value)


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


def test_a_run_without_nitp_is_exported_too(tmp_path):
    job = shrunken("debug", "--nitp.no-enable")
    ours = trained(job, tmp_path / "step-3")
    assert not hasattr(ours, "projector")
    export(tmp_path / "step-3", tmp_path / "out", job)
    check_same(ours, loaded(tmp_path / "out"), 512)


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
    job = job_of("--model.module=tests.foreign", "--model.flavor=qwen3_moe", "--training.seq_len=256")
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


def command(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["export", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("name", ["debug", "debug_moe"])
def test_a_run_is_exported_by_the_command(name, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    words = debug_job(run, "--training.steps=2", "--checkpoint.interval=1")[1:]
    if name == "debug_moe":
        words += ("--checkpoint.last_save_in_hf",)
    done = call(f"--job.config_file=train_configs/{name}.toml", *words)
    assert done.returncode == 0, done.stderr
    # A job of two ranks, and data that this machine lacks: no matter.
    text = (run / "config.toml").read_text()
    text = text.replace("tensor_parallel_degree = 1", "tensor_parallel_degree = 2")
    (run / "config.toml").write_text(text.replace('dataset = "python_stdlib"', 'dataset = "text"'))
    assert command(capsys, run, out) == (0, f"{out}\n", "")
    code, _, problem = command(capsys, out, run)
    assert code == 2
    assert problem.count("\n") == 1

    job = load_job(f"train_configs/{name}.toml", [], 1)
    spec = model_spec("nitp_titan", name, "flex")
    model = built(nitp_model_spec(spec, job.nitp))
    weights = model.state_dict()
    # Of the last step the mixture of experts is in Hugging Face's format already.
    step = run / "checkpoint" / ("step-1" if name == "debug_moe" else "step-2")
    dcp.load(weights, checkpoint_id=step, no_dist=True)
    model.load_state_dict(weights)
    check_same(model.eval(), loaded(out), 320)
    if name == "debug_moe":
        saved = run / "checkpoint" / "step-2"
        (saved / "config.json").write_text((out / "config.json").read_text())
        assert type(loaded(saved)).__name__ == "Ernie4_5_MoeForCausalLM"


def test_bad_words_end_with_2_and_one_line_a_problem(tmp_path, capsys):
    job = tmp_path / "job.toml"
    job.write_text('[model]\nflavor = "debug"\n')
    code, _, errors = command(capsys, tmp_path / "run", tmp_path / "out", "--job.config_file", job)
    assert (code, errors) == (2, f"{tmp_path / 'run'} is not a folder\n")
    code, _, errors = command(capsys, tmp_path, tmp_path / "out", f"--job.config_file={job}", "--nitp.wieght=1")
    assert code == 2
    assert 'did you mean "--nitp.weight"?' in errors
    assert errors.count("\n") == 1
    code, _, errors = command(capsys, tmp_path, tmp_path / "out")
    assert code == 2
    assert "--job.config_file: expected the job's file" in errors
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(tmp_path), str(tmp_path / "out"), "--dtype", "int8"])
    assert exit_.value.code == 2
