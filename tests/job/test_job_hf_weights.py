"""Hugging Face weights that a job starts from: their config.json against the model, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nitp_titan.job import JobError, load_job
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.models.hf.architectures import hf_config
from nitp_titan.models.registry import decoder_config
from tests.helpers.commands import cli_main
from tests.helpers.decoders import backbone


def folder_with(path: Path, values: dict) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(values))
    (path / "model.safetensors").touch()
    return path


@pytest.fixture
def debug(tmp_path) -> dict:
    """config.json of the debug model."""
    return hf_config(decoder_config(FLAVORS["debug"].shape))


def words(tmp_path: Path, folder: Path | None = None, *more: str) -> list[str]:
    load = [] if folder is None else [f"--checkpoint.initial_load_path={folder}"]
    common = ["--checkpoint.enable", "--checkpoint.initial_load_in_hf", f"--job.dump_folder={tmp_path / 'run'}"]
    return [*common, "--tokenizer.name=byte", "--dataloader.dataset=python_stdlib", *load, *more]


def problems(*arguments: str, file: Path | None = None, **options) -> list[str]:
    with pytest.raises(JobError) as caught:
        load_job(file, list(arguments), 1, **options)
    return [str(problem) for problem in caught.value.problems]


def test_a_folder_that_fits_is_taken(tmp_path, debug):
    job = load_job(None, words(tmp_path, folder_with(tmp_path / "hf", debug)), 1)
    assert job.warnings == ()
    assert not any("Hugging Face" in note for note in job.notes)


def test_all_differences_are_told_at_once_with_file_and_line(tmp_path, debug, capsys):
    debug |= {"num_hidden_layers": 3, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "gelu"}
    folder = folder_with(tmp_path / "hf", debug)
    file = tmp_path / "job.toml"
    file.write_text(f'[checkpoint]\nenable = true\ninitial_load_in_hf = true\ninitial_load_path = "{folder}"\n')
    code, _, error = cli_main(capsys, "check", str(file), "--job.dump_folder", str(tmp_path / "run"))
    assert code == 2
    where, config = f"{file}:4: [checkpoint] initial_load_path: ", f"{folder}/config.json has "
    ours = "the job's model has "
    assert sorted(error.splitlines()) == sorted(
        [
            f"{where}{config}num_hidden_layers = 3, {ours}n_layers = 6; set model.shape.n_layers = 3",
            f"{where}{config}rms_norm_eps = 1e-05, {ours}norm_eps = 1e-06; set model.shape.norm_eps = 1e-05",
            f"{where}{config}tie_word_embeddings = true, {ours}tie_embeddings = false; "
            "set model.shape.tie_embeddings = true",
            f'{where}{config}hidden_act = "gelu", {ours}activation = "silu"',
        ]
    )
    assert problems(file=file, for_training=True)[0].startswith(where)


def test_the_tokenizers_folder_is_the_weights_where_no_other_is_named(tmp_path, debug):
    folder = folder_with(tmp_path / "hf", debug | {"vocab_size": 999})
    [problem] = problems(*words(tmp_path, None, f"--model.hf_assets_path={folder}"))
    assert "--model.hf_assets_path: " in problem
    assert "vocab_size = 999" in problem


@pytest.mark.parametrize(("module", "flavor"), [("llama3", "debugmodel"), ("qwen3", "debugmodel"), ("qwen3", "0.6B")])
def test_torchtitans_models_are_compared_too(tmp_path, module, flavor):
    values = hf_config(backbone(module, flavor).model)
    chosen = [f"--model.module={module}", f"--model.flavor={flavor}"]
    load_job(None, words(tmp_path, folder_with(tmp_path / "hf", values), *chosen), 1)
    values["rope_parameters"]["rope_theta"] = values["rope_theta"] = 123.0
    [problem] = problems(*words(tmp_path, folder_with(tmp_path / "hf", values), *chosen))
    assert "has rope_theta = 123.0, the job's model has rope_theta = " in problem


def test_a_model_of_somebody_elses_is_compared_when_it_is_imported(tmp_path):
    chosen = ["--model.module=tests.helpers.foreign", "--model.flavor=deepseek_v3"]
    values = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 3}
    found = problems(*words(tmp_path, folder_with(tmp_path / "hf", values), *chosen))
    assert any("lacks hidden_size" in problem for problem in found)


def test_another_architecture_is_told_with_the_flavor_that_has_it(tmp_path, debug):
    folder = folder_with(tmp_path / "hf", debug)
    found = problems(*words(tmp_path, folder, "--model.flavor=debug_moe"))
    difference = 'architectures = "LlamaForCausalLM", the job\'s model has architecture = "Ernie4_5_MoeForCausalLM"'
    assert any(difference in problem for problem in found)
    assert all('model.module = "nitp_titan" with model.flavor = "debug" computes what it says' in p for p in found)
    # No key of the shape makes one of the other.
    found = problems(*words(tmp_path, folder_with(folder, debug | {"rms_norm_eps": 0.5}), "--model.flavor=debug_moe"))
    assert not any("set model.shape" in problem for problem in found)


def test_sizes_of_an_unknown_decoder_are_compared_and_the_rest_is_said(tmp_path):
    chosen = ["--model.module=gpt_oss", "--model.flavor=debugmodel"]
    dim = backbone("gpt_oss", "debugmodel").model.dim
    folder = folder_with(tmp_path / "hf", {"model_type": "gpt_oss", "hidden_size": dim})
    assert any("only sizes are compared" in note for note in load_job(None, words(tmp_path, folder, *chosen), 1).notes)
    [problem] = problems(*words(tmp_path, folder_with(folder, {"hidden_size": dim + 1}), *chosen))
    assert f"hidden_size = {dim + 1}, the job's model has dim = {dim}" in problem


MISSING = {
    "which does not exist": (),
    "which has no .safetensors file; convert pytorch_model.bin to safetensors": ("config.json", "pytorch_model.bin"),
    "which has no config.json to compare the model with": ("model.safetensors",),
    "names model-2.safetensors, which is not there": ("config.json", "model-1.safetensors", "index"),
}


@pytest.mark.parametrize("message", MISSING)
def test_what_may_still_be_downloaded_is_a_warning_of_check_and_an_error_of_a_run(tmp_path, debug, message):
    folder = tmp_path / "hf"
    for name in MISSING[message]:
        folder.mkdir(exist_ok=True)
        if name == "index":
            index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            (folder / name).write_text(json.dumps(debug))
    arguments = words(tmp_path, folder)
    assert [message in str(warning) for warning in load_job(None, arguments, 1).warnings].count(True) == 1
    assert any(message in problem for problem in problems(*arguments, for_training=True))


def test_a_folder_must_be_named(tmp_path):
    found = problems(*words(tmp_path), for_training=True)
    assert "found true, which needs an initial_load_path or a model.hf_assets_path" in found[0]


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "llama"}', "\xff"])
def test_a_config_that_says_nothing_is_refused(tmp_path, debug, text):
    folder = folder_with(tmp_path / "hf", debug)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    [problem] = problems(*words(tmp_path, folder))
    assert "config.json cannot be read" in problem or "config.json lacks num_hidden_layers" in problem


def test_weights_that_are_not_read_are_not_compared(tmp_path, debug):
    arguments = words(tmp_path, folder_with(tmp_path / "hf", debug | {"num_hidden_layers": 3}))
    assert len(problems(*arguments)) == 1
    # The run goes on from a checkpoint of its own.
    step = tmp_path / "run" / "checkpoint" / "step-5"
    step.mkdir(parents=True)
    assert len(problems(*arguments)) == 1
    (step / ".metadata").touch()
    load_job(None, arguments, 1)
    (step / ".metadata").unlink()
    # Saved for Hugging Face (last_save_in_hf), it is one of its own too.
    (step / "model.safetensors.index.json").touch()
    load_job(None, arguments, 1)
    (step / "model.safetensors.index.json").unlink()
    load_job(None, [*arguments, "--checkpoint.no-initial_load_in_hf"], 1)


def test_quantized_weights_are_read_as_such_or_refused(tmp_path, debug):
    fp8 = {"quantization_config": {"quant_method": "fp8"}}
    folder = folder_with(tmp_path / "hf", debug | fp8)
    asked = "--checkpoint.initial_load_in_hf_quantized"
    [problem] = problems(*words(tmp_path, folder))
    assert 'says that its weights are quantized ("fp8"), expected unquantized ones' in problem
    moe = hf_config(decoder_config(FLAVORS["debug_moe"].shape))
    folder_with(folder, moe | fp8)
    [problem] = problems(*words(tmp_path, folder, "--model.flavor=debug_moe"))
    assert "[checkpoint] initial_load_in_hf_quantized (default of upstream): found false, expected true" in problem
    load_job(None, words(tmp_path, folder, "--model.flavor=debug_moe", asked), 1)
    folder_with(folder, moe)
    [problem] = problems(*words(tmp_path, folder, "--model.flavor=debug_moe", asked))
    assert "found true, but" in problem
