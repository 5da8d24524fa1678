"""``nitp-titan doctor``: what it says of runs, against what a run does."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nitp_titan.runs.manifest import NAME, Entry, Manifest
from nitp_titan.runs.process import Process
from nitp_titan.runs.steps import METADATA
from tests.helpers.commands import call, cli_main, debug_job


def save(folder: Path, *, holds: str = "everything", sealed: bool = True, fingerprint: dict | None = None) -> Path:
    if not sealed:
        tensors = {"w": torch.ones(3), **({"optimizer": {"m": torch.ones(3)}} if holds == "everything" else {})}
        dcp.save(tensors, checkpoint_id=folder, no_dist=True)
        return folder
    folder.mkdir(parents=True)
    (folder / METADATA).write_text("metadata")
    (folder / "__0_0.distcp").write_bytes(b"x" * 100)
    files = {name: Entry.of(folder / name) for name in (METADATA, "__0_0.distcp")}
    Manifest.of(int(folder.name.rpartition("-")[2]), files, holds, fingerprint or {}).write(folder)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with checkpoints of several kinds: 2 without a manifest, 4 and 6 whole."""
    save(tmp_path / "checkpoint" / "step-2", sealed=False)
    for step in (4, 6):
        save(tmp_path / "checkpoint" / f"step-{step}")
    return tmp_path


def doctor(capsys, *words: object) -> tuple[int, dict]:
    code, out, err = cli_main(capsys, "doctor", *map(str, words), "--json")
    return code, json.loads(out) if out else {"said": err}


def test_the_latest_whole_one_is_gone_on_from(run, capsys):
    code, state = doctor(capsys, run)
    assert (code, state["resumes_from"], state["can_resume"], state["why_not"]) == (0, 6, True, [])
    assert [(one["step"], one["holds"], one["problem"]) for one in state["checkpoints"]] == [
        (6, "everything", ""),
        (4, "everything", ""),
        (2, "everything", ""),
    ]
    assert state["checkpoints"][1]["bytes"] == 108 + (run / "checkpoint" / "step-4" / NAME).stat().st_size


def test_damage_is_named_and_passed_over(run, capsys):
    (run / "checkpoint" / "step-6" / "__0_0.distcp").write_bytes(b"x" * 99)
    code, state = doctor(capsys, run)
    assert (code, state["resumes_from"]) == (0, 4)
    assert state["checkpoints"][0]["problem"] == "__0_0.distcp has 99 bytes, not 100"
    (run / "checkpoint" / "step-4" / "__0_0.distcp").write_bytes(b"x" * 99 + b"y")
    assert doctor(capsys, run)[1]["resumes_from"] == 4  # the size is right
    code, state = doctor(capsys, run, "--checksums")
    assert (code, state["resumes_from"]) == (0, 2)
    assert "step-4" in cli_main(capsys, "doctor", str(run), "--checksums")[1]


@pytest.mark.parametrize("holds", ["weights", "hugging face"])
def test_what_holds_weights_alone_cannot_be_gone_on_from(holds, run, capsys):
    save(run / "checkpoint" / "step-8", holds=holds)
    code, state = doctor(capsys, run)
    assert (code, state["resumes_from"], state["can_resume"]) == (2, None, False)
    assert state["why_not"][0].startswith("step-8 has no optimizer state: a run can start from it")


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    code, state = doctor(capsys, tmp_path)
    assert (code, state["why_not"]) == (2, [f"{tmp_path / 'checkpoint'} has no checkpoint"])
    save(tmp_path / "checkpoint" / "step-2", sealed=False).joinpath(METADATA).unlink()
    code, state = doctor(capsys, tmp_path)
    assert (code, state["why_not"]) == (2, [f"{tmp_path / 'checkpoint'} has no whole checkpoint"])


def test_a_checkpoint_of_an_older_version_is_looked_into(tmp_path, capsys):
    place = save(tmp_path / "checkpoint" / "step-2", sealed=False)
    shard = next(place.glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1000])
    code, state = doctor(capsys, tmp_path)
    assert (code, state["can_resume"]) == (2, False)
    assert "bytes, of at least" in state["checkpoints"][0]["problem"]
    shard.unlink()
    assert doctor(capsys, tmp_path)[1]["checkpoints"][0]["problem"] == f"{shard.name} is missing"
    shard.write_bytes(content)
    (place / METADATA).write_bytes(b"")
    assert doctor(capsys, tmp_path)[1]["checkpoints"][0]["problem"] == "its .metadata cannot be read (EOFError)"
    save(tmp_path / "checkpoint" / "step-4", holds="weights", sealed=False)
    code, state = doctor(capsys, tmp_path)
    assert (code, state["checkpoints"][0]["holds"]) == (2, "weights")
    save(tmp_path / "seeds" / "checkpoint" / "step-0", holds="weights")
    assert doctor(capsys, tmp_path / "seeds")[1]["resumes_from"] == 0  # a seed is to start from


def test_a_job_may_say_where_to_go_on_from(run, capsys):
    job = ("--job.config_file", "train_configs/debug.toml", "--tokenizer.name=byte")
    assert doctor(capsys, run, *job)[1]["resumes_from"] == 6
    assert doctor(capsys, run, *job, "--checkpoint.load_step=4")[1]["resumes_from"] == 4
    code, state = doctor(capsys, run, *job, "--checkpoint.load_step=5")
    assert (code, state["why_not"]) == (2, ["checkpoint.load_step is 5, of which there is no whole checkpoint"])
    code, state = doctor(capsys, run, *job, "--checkpoint.no-enable")
    assert (code, state["why_not"]) == (2, ["checkpoint.enable is false: the job would start anew"])


def test_what_is_left_and_what_is_nobodys(run, capsys):
    for name in (".saving-8", "abandoned-4", "abandoned-4.2", "best-step-9", "step-9.bak"):
        (run / "checkpoint" / name).mkdir()
    assert doctor(capsys, run)[1]["left"] == [".saving-8", "abandoned-4", "abandoned-4.2"]


def test_what_the_run_says_of_itself(run, capsys):
    assert doctor(capsys, run)[1]["status"] is None
    values = {"state": "running", "step": 7, "steps": 9, "tokens": 3, "time": "t", "started": "t"}
    dead = {"host": socket.gethostname(), "pid": 2**22 + 1, "began": "x", "machine": Process.here().machine}
    (run / "status.json").write_text(json.dumps(values | dead))
    status = doctor(capsys, run)[1]["status"]
    assert (status["state"], status["alive"], status["step"]) == ("running", False, 7)
    said = cli_main(capsys, "doctor", str(run))[1]
    assert "status     killed: it says that it is running, and its process is dead at step 7 of 9, t\n" in said
    ended = values | {"state": "stopped", "reason": "step 7 of rank 0"} | dead
    (run / "status.json").write_text(json.dumps(ended))
    assert "status     stopped at step 7 of 9, t: step 7 of rank 0\n" in cli_main(capsys, "doctor", str(run))[1]


def test_where_a_branch_comes_from(run, capsys):
    assert doctor(capsys, run)[1]["branched_from"] == ""
    for path in ("/x/parent/checkpoint/step-4", "/x/parent/step-4"):
        (run / "config.toml").write_text(f'[checkpoint]\nfolder = "checkpoint"\nbranch_from = "{path}"\n')
        assert doctor(capsys, run)[1]["branched_from"] == "parent step 4"
    (run / "config.toml").write_text('[checkpoint]\nfolder = "checkpoint"\nbranch_from = "none"\n')
    assert doctor(capsys, run)[1]["branched_from"] == ""


@pytest.mark.parametrize("make", [lambda p: None, Path.mkdir, Path.touch])
def test_what_is_no_run_is_one_line(make, tmp_path, capsys):
    make(tmp_path / "x")
    code, out, err = cli_main(capsys, "doctor", str(tmp_path / "x"))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert str(tmp_path / "x") in err


def test_words_of_a_job_without_a_job_are_refused(run, capsys):
    code, _, err = cli_main(capsys, "doctor", str(run), "--optimizer.lr", "1")
    assert code == 2
    assert "--optimizer.lr without --job.config_file" in err


def test_a_real_run_and_what_jobs_would_change(tmp_path):
    assert call(*debug_job(tmp_path / "run", "--training.steps=4")).returncode == 0

    def doctor(*words: str):
        return call(*words, entry=(sys.executable, "-m", "nitp_titan.cli", "doctor"))

    begin = time.monotonic()
    done = doctor(str(tmp_path / "run"))
    assert time.monotonic() - begin < 30  # under 5 s on a machine that has nothing else to do
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("goes on from step-4; the run reads the checksums")
    job = debug_job(tmp_path / "run", "--training.steps=6")
    done = doctor(str(tmp_path / "run"), *job, "--optimizer.lr=0.5", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["changes"] == ["training.steps (was 4, is 6)", "optimizer.lr (was 0.002, is 0.5)"]
    done = doctor(str(tmp_path / "run"), *job, "--dataloader.seed=3")
    assert done.returncode == 2
    refused = 'is of other data: dataloader.seed (was 0, is 3); restore it, or set checkpoint.allow_changes = ["data"]'
    assert done.stdout.splitlines()[-1] == f"cannot go on: step-4 {refused}"
    run = call(*job, "--dataloader.seed=3")
    assert run.returncode == 2
    assert refused in run.stderr
