"""Real runs over hostile files: nothing in a checkpoint, a Hugging Face folder, a tokenizer or a data set is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from nitp_titan.job import JobError
from nitp_titan.runs.manifest import NAME, Entry, Manifest
from nitp_titan.runs.steps import METADATA
from tests.checkpoints.test_whole import run
from tests.helpers.commands import call, cli_main, debug_job


class Touches:
    """Something whose unpickling makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of the debug job with a checkpoint of its second step."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    assert call(*debug_job(folder, "--training.steps=2")).returncode == 0
    return folder


def made_hostile(place: Path, mark: Path) -> None:
    """Put something into a checkpoint's metadata that would be run, and make its manifest fit."""
    metadata = pickle.loads((place / METADATA).read_bytes())
    metadata.planner_data = Touches(mark)
    (place / METADATA).write_bytes(pickle.dumps(metadata))
    manifest = Manifest.read(place)
    assert manifest is not None
    files = {**manifest.files, METADATA: Entry.of(place / METADATA)}
    Manifest.of(manifest.step, files, manifest.holds, manifest.fingerprint).write(place)


@pytest.mark.parametrize("sealed", [True, False])
def test_no_way_to_a_checkpoint_runs_it(sealed, saved, tmp_path, corpus, capsys):
    """A restart, an explicit step, both initial loads, a branch, an export and the doctor."""
    folder, mark = shutil.copytree(saved, tmp_path / "run"), tmp_path / "ran"
    place = folder / "checkpoint" / "step-2"
    made_hostile(place, mark)
    if not sealed:
        (place / NAME).unlink()
    asks = "asks for posix.mkdir, which no checkpoint needs"
    for keys in (
        {},
        {"load_step": 2},
        {"verify_checksums": False},
    ):
        with pytest.raises(JobError, match=asks):
            run(folder, corpus, steps=3, **keys)
    for keys in (
        {"initial_load_path": str(place)},
        {"initial_load_path": str(place), "initial_load_model_only": False},
        {"branch_from": str(place), "verify_checksums": False},
    ):
        with pytest.raises(JobError, match=asks):
            run(tmp_path / "other", corpus, steps=3, **keys)
    code, _, err = cli_main(
        capsys, "export", str(place), str(tmp_path / "hf"), "--job.config_file", str(folder / "config.toml")
    )
    assert code == 2
    assert asks in err
    cli_main(capsys, "doctor", str(folder), "--checksums")
    assert not mark.exists()
    # What it does where it is run, so that this test can fail.
    dcp.FileSystemReader(place).read_metadata()
    assert mark.exists()


def test_a_hugging_face_folder_and_a_tokenizer_run_nothing(saved, tmp_path, capsys):
    hf, mark = tmp_path / "hf", tmp_path / "ran"
    place = saved / "checkpoint" / "step-2"
    code, _, err = cli_main(capsys, "export", str(place), str(hf), "--job.config_file", str(saved / "config.toml"))
    assert code == 0, err
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
        (hf / name).write_bytes(pickle.dumps(Touches(mark)))
    code_file = f"import os\nos.mkdir({str(mark)!r})\n"
    for name in ("modeling_x.py", "tokenization_x.py", "configuration_x.py", "__init__.py"):
        (hf / name).write_text(code_file)
    config = json.loads((hf / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (hf / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((hf / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
    tokenizer["chat_template"] = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (hf / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.py").write_text(code_file)
    (data / "dataset_infos.json").write_text("{}")
    (data / "state.pkl").write_bytes(pickle.dumps(Touches(mark)))
    (data / "text.jsonl").write_text('{"text": "a line of text"}\n' * 3000)
    done = call(
        *debug_job(tmp_path / "run", "--training.steps=1", "--tokenizer.name=huggingface", "--dataloader.dataset=text"),
        f"--dataloader.dataset_path={data / 'text.jsonl'}",
        f"--model.hf_assets_path={hf}",
        f"--checkpoint.initial_load_path={hf}",
        "--checkpoint.initial_load_in_hf",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not mark.exists()
