"""First weights that a job names are loaded, or the job is refused."""

from __future__ import annotations

import json

import pytest

from nitp_titan.job import JobError, load_job
from nitp_titan.job.backbone import model_spec
from nitp_titan.job.checks.initial import latest_step
from nitp_titan.models.hf.architectures import hf_config


def problems(*overrides: str, for_training: bool = True) -> list[str]:
    try:
        load_job(None, list(overrides), 1, for_training=for_training)
    except JobError as error:
        return [str(problem).removeprefix("command line: --checkpoint.") for problem in error.problems]
    return []


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "other" / "checkpoint" / "step-7"
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    return folder


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("initial_load_path=/a", 'initial_load_path: found "/a", which needs checkpoint.enable = true: the run would '
         "start from random weights; load_only = true beside it saves none"),
        ("initial_load_in_hf", "initial_load_in_hf: found true, which needs checkpoint.enable = true"),
        ("load_step=0", "load_step: found 0, which needs checkpoint.enable = true: the run would start from random"),
        ("create_seed_checkpoint", "create_seed_checkpoint: found true, which needs checkpoint.enable = true: nothing "
         "would be saved"),
    ],
)  # fmt: skip
def test_what_a_run_starts_from_needs_checkpoints(option, expected):
    [problem] = problems(f"--checkpoint.{option}", for_training=False)
    assert problem.startswith(expected)


def test_last_save_without_checkpoints_is_said():
    job = load_job(None, ["--checkpoint.last_save_in_hf"], 1)
    assert job.doubts == ("checkpoint.last_save_in_hf is ignored: checkpoint.enable is false",)


def start(path, *more: str) -> list[str]:
    return problems(
        "--job.dump_folder=/tmp/no-such-run", "--checkpoint.enable", f"--checkpoint.initial_load_path={path}", *more
    )


def test_a_checkpoint_is_taken_by_a_relative_path_too(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert start(checkpoint) == []
    assert start("other/checkpoint/step-7") == []
    assert start("gs://bucket/step-7") == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("other/step-7", "which does not exist, expected the folder of a checkpoint"),
        ("~/step-7", 'which does not exist, expected the folder of a checkpoint; write the path out: "~" is not'),
        ("other/checkpoint/step-7/.metadata", "which is a file, expected the folder"),
        ("other", 'is no complete checkpoint: it has no .metadata; did you mean "other/checkpoint/step-7"?'),
        ("other/checkpoint", 'it has no .metadata; did you mean "other/checkpoint/step-7"?'),
        ("hf", "it has no .metadata; set initial_load_in_hf = true for Hugging Face's safetensors"),
    ],
)
def test_a_path_without_a_checkpoint_is_refused_with_the_nearest(checkpoint, tmp_path, monkeypatch, path, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").touch()
    [problem] = start(path)
    assert problem.startswith(f'initial_load_path: found "{path}", ')
    assert expected in problem
    # It may be still to be made when a job is checked.
    words = ["--job.dump_folder=run", "--checkpoint.enable", f"--checkpoint.initial_load_path={path}"]
    [warning] = load_job(None, words, 1).warnings
    assert str(warning).endswith(problem)


def test_hugging_faces_weights(checkpoint, tmp_path):
    (tmp_path / "hf").mkdir()
    [problem] = start(tmp_path / "hf", "--checkpoint.initial_load_in_hf")
    assert "which has no .safetensors file" in problem
    (tmp_path / "hf" / "pytorch_model.bin").touch()
    [problem] = start(tmp_path / "hf", "--checkpoint.initial_load_in_hf")
    assert "convert pytorch_model.bin to safetensors" in problem
    (tmp_path / "hf" / "model.safetensors").touch()
    [problem] = start(tmp_path / "hf", "--checkpoint.initial_load_in_hf")
    assert "which has no config.json to compare the model with" in problem
    spec = model_spec("nitp_titan", "debug", "flex")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf_config(spec.model)))
    assert start(tmp_path / "hf", "--checkpoint.initial_load_in_hf") == []
    in_assets = ["--checkpoint.enable", "--checkpoint.initial_load_in_hf", f"--job.dump_folder={tmp_path / 'run'}"]
    [problem] = problems(*in_assets)
    assert problem == "initial_load_in_hf: found true, which needs an initial_load_path or a model.hf_assets_path"
    assert problems(*in_assets, f"--model.hf_assets_path={tmp_path / 'hf'}") == []
    assert load_job(None, [*in_assets, f"--model.hf_assets_path={tmp_path / 'hf'}"], 1).doubts == ()


def test_a_run_with_a_checkpoint_of_its_own_needs_no_other(checkpoint):
    run = checkpoint.parents[1]
    words = [f"--job.dump_folder={run}", "--checkpoint.enable"]
    assert problems(*words, "--checkpoint.initial_load_path=/no/where") == []
    said = f"checkpoint.initial_load_path is not read: the run goes on from its own {checkpoint}"
    for path, expected in (("/no/where", True), ("none", False)):
        job = load_job(None, [*words, f"--checkpoint.initial_load_path={path}"], 1)
        assert (said in job.notes) == expected
        assert job.doubts == ()
    assert problems(*words, "--checkpoint.load_step=7") == []
    [problem] = problems(*words, "--checkpoint.load_step=8")
    assert problem == f"load_step: found 8, which {run}/checkpoint has no checkpoint of; the latest there is 7"


def test_the_latest_step_is_of_whole_checkpoints_with_such_a_name(checkpoint):
    folder = checkpoint.parent
    for name in ("step-9", "step-8.bak", "best-step-10", "step-x"):
        (folder / name).mkdir()
    (folder / "step-8.bak" / ".metadata").touch()
    (folder / "best-step-10" / ".metadata").touch()
    assert latest_step(folder) == 7
    (folder / "step-9" / "model.safetensors.index.json").touch()
    assert latest_step(folder) == 9
    assert latest_step(folder / "none") is None


def test_what_is_to_be_kept_for_good_is_on_a_disk():
    remote = ["--checkpoint.enable", "--checkpoint.folder=gs://bucket/run", "--tokenizer.name=byte"]
    with pytest.raises(JobError) as caught:
        load_job(None, [*remote, "--checkpoint.keep_every=1000"], 1)
    assert "checkpoint.keep_every: found 1000, which does not go with the remote path gs://bucket/run" in str(
        caught.value
    )
