"""The training entry as a user calls it: one process, several, resumed, and with a bad job."""

from __future__ import annotations

import json
import sys

import pytest

from nitp_titan.job.reading.command_line import split_config_file
from nitp_titan.runs.scalars import read_scalars
from nitp_titan.train import main
from tests.helpers.commands import call, debug_job, losses


def test_a_run_leaves_what_the_readme_says_and_is_reproduced_by_its_resolved_file(tmp_path):
    done = call(*debug_job(tmp_path / "run", "--training.steps=4"))
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.toml", "metrics.jsonl", "tb", "checkpoint"} <= names
    assert (tmp_path / "run" / "checkpoint" / "step-4" / ".metadata").exists()
    assert f"Run folder: {tmp_path / 'run'}" in done.stdout.splitlines()[-1]
    assert {"loss_metrics/ntp_loss", "loss_metrics/nitp_loss"} <= read_scalars(tmp_path / "run").keys()
    last_line = [line for line in done.stdout.splitlines() if "step:  4" in line]
    assert "ntp:" in last_line[0]
    assert "nitp:" in last_line[0]

    resolved = str(tmp_path / "run" / "config.toml")
    again = call("--job.config_file", resolved, "--job.dump_folder", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    assert call(*debug_job(tmp_path / "whole", "--training.steps=4")).returncode == 0
    assert call(*debug_job(tmp_path / "parts", "--training.steps=2")).returncode == 0
    resumed = call(*debug_job(tmp_path / "parts", "--training.steps=4"))
    assert resumed.returncode == 0, resumed.stderr
    assert "Training starts at step 3" in resumed.stdout
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def test_a_finished_run_says_so_and_keeps_its_file(tmp_path):
    job = debug_job(tmp_path / "run", "--training.steps=1")
    assert call(*job).returncode == 0
    resolved = tmp_path / "run" / "config.toml"
    before = resolved.read_text()
    done = call("--job.config_file", str(resolved))
    assert done.returncode == 0, done.stderr
    assert "Nothing to train" in done.stdout
    assert resolved.read_text() == before


def test_data_that_cannot_be_read_ends_with_2_and_a_line(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"content": "a"}\n')
    data = ("--dataloader.dataset=text", f"--dataloader.dataset_path={tmp_path / 'data.jsonl'}")
    done = call(*debug_job(tmp_path / "run", *data))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "content" in done.stderr


def test_run_train_launches_several_ranks(tmp_path):
    config = {"CONFIG_FILE": "train_configs/debug.toml", "NGPU": "2", "PYTHON": sys.executable}
    words = debug_job(tmp_path / "run", "--training.steps=2", "--training.local_batch_size=4")[1:]
    done = call(*words, entry=("./run_train.sh",), **config)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run").keys() == {1, 2}
    assert "2 ranks" in done.stdout


@pytest.mark.parametrize("entry", [(sys.executable, "-m", "nitp_titan.train"), ("./run_train.sh",)])
def test_a_bad_job_ends_with_2_and_one_line_a_problem(tmp_path, entry):
    job = tmp_path / "job.toml"
    job.write_text('[model]\nflavor = "debugg"\n[nitp]\nwieght = 1\n')
    done = (
        call("--job.config_file", str(job), entry=entry[:1] + entry[1:])
        if len(entry) > 1
        else call(entry=entry, CONFIG_FILE=str(job), PYTHON=sys.executable)
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "did you mean" in done.stderr
    assert "wieght" in done.stderr
    assert "debugg" in done.stderr


def test_config_file_is_taken_out_of_the_words():
    assert split_config_file(["--a.b", "1", "--job.config_file", "f", "--c.d"]) == ("f", ["--a.b", "1", "--c.d"])
    assert split_config_file(["--job.config_file=f"]) == ("f", [])
    assert split_config_file(["--job.config_file", "f", "--job.config-file", "g"]) == ("g", [])
    assert split_config_file(["--job.config_file="]) == (None, [])
    assert split_config_file(["--a.b", "1"]) == (None, ["--a.b", "1"])


def test_without_a_file_the_usage_is_printed():
    done = call()
    assert done.returncode == 2
    assert "--job.config_file FILE" in done.stderr


def test_a_refusal_leaves_torchrun_a_line_and_no_traceback_to_print(tmp_path, monkeypatch, capsys):
    # TorchTitan writes what its trainer raises to this file, which torchrun prints.
    handed = tmp_path / "error.json"
    handed.write_text("{}")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(handed))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main([f"--job.config_file={tmp_path / 'nowhere.toml'}"]) == 2
    assert "nowhere.toml" in capsys.readouterr().err
    assert "nowhere.toml" in json.loads(handed.read_text())["message"]
