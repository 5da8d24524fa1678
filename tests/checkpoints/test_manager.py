"""Checkpoints that fit a run, those of runs that gain or leave their projector among them, and those that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from nitp_titan.checkpoints.manager import CheckpointManager
from nitp_titan.checkpoints.same_run import without_what_the_checkpoint_lacks
from nitp_titan.data.loader import ADDED_LATER, TextDataLoader
from nitp_titan.data.tokenizer import ByteTokenizer
from nitp_titan.job import JobError
from nitp_titan.job.model_facts import facts
from nitp_titan.models.hf.config_json import differences
from nitp_titan.models.registry import model_registry
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.runs.manifest import NAME as MANIFEST
from nitp_titan.tools.export.folder import export
from tests.helpers.commands import call, debug_job, losses
from tests.helpers.decoders import backbone
from tests.helpers.exports import job_of, logits_of, trained
from tests.helpers.trainers import running, trainer_config

TEXT = ["--dataloader.dataset=text", "--dataloader.dataset_path={texts}", "--dataloader.num_streams=2"]


def test_a_run_resumes_from_before_its_start_step(tmp_path):
    late = "--nitp.start_step=3"
    assert call(*debug_job(tmp_path / "whole", "--training.steps=4", late)).returncode == 0
    assert call(*debug_job(tmp_path / "parts", "--training.steps=2", late)).returncode == 0
    resumed = call(*debug_job(tmp_path / "parts", "--training.steps=4", late))
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def test_nitp_starts_from_a_checkpoint_of_stock_torchtitan(tmp_path):
    assert call(*debug_job(tmp_path / "stock", "--training.steps=2", "--nitp.no-enable")).returncode == 0
    resumed = call(*debug_job(tmp_path / "stock", "--training.steps=3"))
    assert resumed.returncode == 0, resumed.stderr
    assert "has no projector" in resumed.stdout
    assert "Training starts at step 3" in resumed.stdout
    fresh = ("--checkpoint.initial_load_path", str(tmp_path / "stock" / "checkpoint" / "step-2"))
    started = call(*debug_job(tmp_path / "fresh", "--training.steps=1", *fresh))
    assert started.returncode == 0, started.stderr
    assert losses(tmp_path / "fresh")[1] < losses(tmp_path / "stock")[1] + 1


def test_another_model_is_refused_and_a_baseline_goes_on_without_the_projector(tmp_path):
    assert call(*debug_job(tmp_path / "run", "--training.steps=2")).returncode == 0
    refused = call(*debug_job(tmp_path / "run", "--training.steps=3", "--model.shape.n_layers=4"))
    assert refused.returncode == 2, refused.stderr
    step = tmp_path / "run" / "checkpoint" / "step-2"
    changed = "is of another model: model.shape.n_layers (was 6, is 4)"
    restore = 'restore it, or set checkpoint.allow_changes = ["model"]'
    assert refused.stderr.splitlines()[-1] == f"{step}: {changed}; {restore}"
    assert "Traceback" not in refused.stdout + refused.stderr
    # What is allowed must fit all the same.
    four = ("--model.shape.n_layers=4", "--checkpoint.allow_changes=model")
    refused = call(*debug_job(tmp_path / "run", "--training.steps=3", *four))
    assert refused.returncode == 2, refused.stderr
    message = f"{step}: has tensors too many for the job's model: layers.4.attention."
    assert refused.stderr.splitlines()[-1].startswith(message)
    resumed = call(*debug_job(tmp_path / "run", "--training.steps=3", "--nitp.no-enable"))
    assert resumed.returncode == 0, resumed.stderr
    assert "has NITP's projector, which this run does not train: it is left out" in resumed.stdout
    assert "Training starts at step 3" in resumed.stdout


@pytest.mark.parametrize(
    ("before", "after", "changed", "restore"),
    [
        (["--dataloader.num_streams=4"], ["--dataloader.num_streams=8"], "dataloader.num_streams (was 4, is 8)",
         "set dataloader.num_streams = 4"),
        (["--dataloader.no-infinite"], [], "dataloader.infinite (was false, is true)",
         "set dataloader.infinite = false"),
        (TEXT, [*TEXT, "--dataloader.streaming"], "dataloader.streaming (was false, is true)",
         "without shards: restore dataloader.dataset and streaming"),
        ([*TEXT, "--dataloader.streaming"], TEXT, "dataloader.streaming (was true, is false)",
         "without documents: restore dataloader.dataset and streaming"),
    ],
)  # fmt: skip
def test_data_that_are_drawn_otherwise_are_refused(before, after, changed, restore, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "abcd":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} line of text\n" * 400)
    before, after = ([word.format(texts=tmp_path / "texts") for word in words] for words in (before, after))
    first = call(*debug_job(tmp_path / "run", "--training.steps=2", *before))
    assert first.returncode == 0, first.stderr
    refused = call(*debug_job(tmp_path / "run", "--training.steps=3", *after))
    assert refused.returncode == 2, refused.stderr
    allow = 'restore it, or set checkpoint.allow_changes = ["data"]'
    assert refused.stderr.splitlines()[-1].endswith(f"is of other data: {changed}; {allow}")
    # A checkpoint of before there were manifests says what its loader's state tells.
    manifest = tmp_path / "run" / "checkpoint" / "step-2" / MANIFEST
    kept = manifest.read_text()
    manifest.unlink()
    refused = call(*debug_job(tmp_path / "run", "--training.steps=3", *after))
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.splitlines()[-1].endswith(
        f'{restore}, or checkpoint.exclude_from_loading = ["dataloader"] to start the data afresh'
    )
    manifest.write_text(kept)
    afresh = "--checkpoint.allow_changes=data"
    resumed = call(*debug_job(tmp_path / "run", "--training.steps=3", *after, afresh))
    assert resumed.returncode == 0, resumed.stderr
    assert "The data start afresh, since they are other data" in resumed.stdout


@pytest.mark.parametrize("streaming", [False, True])
def test_a_checkpoint_of_before_a_part_of_the_loaders_state_resumes(streaming, tmp_path, corpus):
    loader = TextDataLoader(
        TextDataLoader.Config(dataset="text", dataset_path=str(corpus), num_streams=2, streaming=streaming),
        dp_world_size=1, dp_rank=0, tokenizer=ByteTokenizer(ByteTokenizer.Config()), seq_len=16, local_batch_size=1,
    )  # fmt: skip
    wanted = loader.state_dict()
    later = set(ADDED_LATER) & wanted.keys()
    assert later == ({"infinite", "shuffle_buffer"} if streaming else {"infinite"})
    old = {key: value for key, value in wanted.items() if key not in later}
    old["sequences"] = torch.tensor(7)
    torch.distributed.checkpoint.save({"dataloader": old}, checkpoint_id=tmp_path / "old", no_dist=True)
    stored = FileSystemReader(tmp_path / "old").read_metadata().state_dict_metadata
    state = without_what_the_checkpoint_lacks({"dataloader": loader}, stored)
    torch.distributed.checkpoint.load(state, checkpoint_id=tmp_path / "old", no_dist=True)
    assert int(loader.state_dict()["sequences"]) == 7


@pytest.fixture
def tensors(tmp_path, corpus) -> dict[str, torch.Tensor]:
    """The debug model's."""
    with running(
        trainer_config(tmp_path / "first", corpus, checkpoint=CheckpointManager.Config(enable=True))
    ) as trainer:
        return {name: torch.zeros(value.shape) for name, value in trainer.model_parts[0].state_dict().items()}


def saved(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.distributed.checkpoint.save(tensors, checkpoint_id=folder, no_dist=True)
    return folder


MISFITS = {
    "lacks tensors for the job's model: layers.6.attention.": {"n_layers": 7},
    "has tensors too many for the job's model: layers.4.attention.": {"n_layers": 4},
    "layers.0.feed_forward.w1.weight 384x128, not 128x128": {"hidden_dim": 128},
}


@pytest.mark.parametrize("message", MISFITS)
def test_another_models_checkpoint_is_refused(tensors, message, tmp_path, corpus):
    folder = saved(tensors, tmp_path / "other")
    spec = model_registry("debug", **MISFITS[message])
    assert message in refusal(tmp_path, corpus, folder, model_spec=spec)


def test_another_or_half_a_projector_is_none(tensors, tmp_path, corpus):
    folder = saved(tensors, tmp_path / "other")
    message = refusal(tmp_path, corpus, folder, nitp=NITPConfig(geometry_freq=0, projector_ratio=2))
    assert "of other sizes for the job's model: projector.w1.weight 512x128, not 256x128" in message
    del tensors["projector.w2.weight"]
    message = refusal(tmp_path, corpus, saved(tensors, tmp_path / "half"))
    assert "lacks tensors for the job's model: projector.w2.weight" in message


def test_a_checkpoint_of_the_model_alone_is_to_start_from(tensors, tmp_path, corpus):
    folder = saved(tensors, tmp_path / "new" / "checkpoint" / "step-2")
    assert "has no optimizer state: a run can start from it" in refusal(tmp_path, corpus, folder)
    with running(loading(tmp_path / "another", corpus, folder)) as trainer:
        assert trainer.checkpointer.load()


def loading(tmp_path: Path, corpus: Path, folder: Path, *, hf: bool = False, **changes):
    start = CheckpointManager.Config(enable=True, initial_load_path=str(folder), initial_load_in_hf=hf)
    return trainer_config(tmp_path / "new", corpus, checkpoint=start, **changes)


def refusal(tmp_path: Path, corpus: Path, folder: Path, **options) -> str:
    with running(loading(tmp_path, corpus, folder, **options)) as trainer:
        before = {name: value.clone() for name, value in trainer.model_parts[0].state_dict().items()}
        with pytest.raises(JobError) as caught:
            trainer.checkpointer.load()
        # Nothing of it has been read.
        after = trainer.model_parts[0].state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    [problem] = caught.value.problems
    assert problem.where == str(folder)
    return str(problem)


@pytest.fixture(params=["debug", "debug_moe"])
def hugging_face(request, tmp_path):
    """A flavor, its model with weights of its own, and their Hugging Face folder."""
    job = job_of(f"--model.flavor={request.param}", "--training.seq_len=64")
    model = trained(job, tmp_path / "step-3")
    export(tmp_path / "step-3", tmp_path / "hf", job)
    return request.param, model, tmp_path / "hf"


def test_hugging_face_weights_compute_the_same_again(hugging_face, tmp_path, corpus):
    flavor, model, folder = hugging_face
    tokens = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(3))
    with running(loading(tmp_path, corpus, folder, flavor=flavor, hf=True)) as trainer:
        assert trainer.checkpointer.load()
        weights = trainer.model_parts[0].state_dict()
        loaded = {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in weights.items()}
    twin = backbone("nitp_titan", flavor).model.build()
    missing, extra = twin.load_state_dict(loaded, strict=False)
    assert not [name for name in missing if "cache" not in name]
    assert all(name.startswith("projector.") for name in extra)
    assert torch.equal(logits_of(twin.eval(), tokens), logits_of(model, tokens))


def changed(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_hugging_face_weights_of_another_model_are_refused(hugging_face, tmp_path, corpus):
    flavor, _, folder = hugging_face
    kept = (folder / "model.safetensors").read_bytes()
    bias, norm = "model.layers.1.self_attn.q_proj.bias", "model.layers.1.input_layernorm.weight"
    block = f"model.layers.{len(backbone('nitp_titan', flavor).model.layers)}.input_layernorm.weight"
    cases = [
        (lambda t: t.update({bias: torch.zeros(128)}), f"has tensors too many for the job's model: {bias}"),
        (lambda t: t.update({block: torch.zeros(128)}), f"has tensors too many for the job's model: {block}"),
        (lambda t: t.pop(norm), f"lacks tensors for the job's model: {norm}"),
        (lambda t: t.update({norm: torch.zeros(64)}), f"of other sizes for the job's model: {norm} 64, not 128"),
    ]
    for change, message in cases:
        changed(folder, change)
        assert message in refusal(tmp_path, corpus, folder, flavor=flavor, hf=True)
        (folder / "model.safetensors").write_bytes(kept)
    (folder / "old.safetensors").write_bytes(kept)
    assert "has tensors in several files, of which one is meant: " in refusal(
        tmp_path, corpus, folder, flavor=flavor, hf=True
    )
    # A multi-token-prediction head is none of the decoder's.
    (folder / "old.safetensors").unlink()
    changed(folder, lambda t: t.update({block: torch.zeros(128)}))
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with running(loading(tmp_path, corpus, folder, flavor=flavor, hf=True)) as trainer:
        assert trainer.checkpointer.load()


def test_what_is_saved_for_hugging_face_can_be_started_from(tmp_path, corpus):
    last = {"last_save_in_hf": True, "last_save_model_only": True}
    config = trainer_config(tmp_path / "first", corpus, checkpoint=CheckpointManager.Config(enable=True, **last))
    with running(config) as trainer:
        trainer.checkpointer.save(7, last_step=True)
        first = {name: value.clone() for name, value in trainer.model_parts[0].state_dict().items()}
    folder = tmp_path / "first" / "checkpoint" / "step-7"
    values = json.loads((folder / "config.json").read_text())
    computed = facts("nitp_titan", "debug").computed
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert differences(values, computed) == []
    with running(loading(tmp_path, corpus, folder, hf=True)) as trainer:
        assert trainer.checkpointer.load()
        second = trainer.model_parts[0].state_dict()
        assert all(torch.equal(second[name], first[name]) for name in first if not name.startswith("projector."))
