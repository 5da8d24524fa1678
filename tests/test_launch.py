"""What the ending of torchrun's ranks is turned into, and the words that ``nitp-titan train`` takes."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest

from nitp_titan import launch
from nitp_titan.launch import exit_code_of
from nitp_titan.runs.status import StatusFile, read_status, replace
from tests.helpers.commands import call, cli_main


def rank(exitcode: int, timestamp: int = 0, message: object = "<NONE>") -> SimpleNamespace:
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp, error_file_data={"message": message})


def failed(**ranks: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(failures={int(name[1:]): failure for name, failure in ranks.items()})


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (None, (0, "")),
        (failed(r0=rank(2, 1, "job.toml: bad"), r1=rank(2, 1)), (2, "rank 0: job.toml: bad")),
        # The agent has ended the others, when one had said what is wrong.
        (failed(r0=rank(-15, 5), r1=rank(2, 9, "corpus: line 3")), (2, "rank 1: corpus: line 3")),
        (failed(r0=rank(1, 7, {"message": "peer\nmore"}), r3=rank(3, 8)), (3, "rank 3: ended with exit code 3")),
        # The first one to go is the reason of the rest.
        (failed(r0=rank(1, 9, "peer"), r1=rank(-9, 5)), (1, "rank 1: ended by SIGKILL")),
        (failed(r1=rank(139, 5)), (1, "rank 1: ended with exit code 139")),
        (RuntimeError("no rendezvous\nat all"), (1, "torchrun: no rendezvous")),
        (SystemExit(2), (2, "")),
    ],
)  # fmt: skip
def test_torchruns_error_is_a_rank_and_its_code(failure, expected):
    assert exit_code_of(failure) == expected


def test_a_status_that_a_killed_rank_has_left_is_completed(tmp_path, capsys):
    StatusFile(tmp_path, 9, print).write("running", step=4, tokens=1)
    status = read_status(tmp_path)
    launch._tell(str(tmp_path), 1, "rank 1: ended by SIGKILL")
    # Rank 0 lives: this process.
    assert read_status(tmp_path).state == "running"
    replace(tmp_path / "status.json", dataclasses.replace(status, began="1"))
    launch._tell(str(tmp_path), 1, "rank 0: ended by SIGKILL")
    ended = read_status(tmp_path)
    assert (ended.state, ended.step, ended.exit_code, ended.reason) == ("failed", 4, 1, "rank 0: ended by SIGKILL")
    assert capsys.readouterr().err == "rank 1: ended by SIGKILL\nrank 0: ended by SIGKILL\n"


def test_the_verb_hands_file_ranks_and_options_to_the_launcher(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "launch", lambda file, options, **more: asked.append((file, options, more)) or 3)
    words = ("train", "a.toml", "--ngpu", "2", "--training.steps", "3", "--nitp.no-enable")
    assert cli_main(capsys, *words)[0] == 3
    expected = {"entry": "nitp-titan train", "ranks_here": 2}
    assert asked == [("a.toml", ["--training.steps", "3", "--nitp.no-enable"], expected)]


def test_a_bad_job_is_refused_before_a_rank_starts(tmp_path):
    (tmp_path / "job.toml").write_text("[nitp]\nwieght = 1\n")
    words = ("train", str(tmp_path / "job.toml"), "--ngpu", "2")
    done = call(*words, entry=(sys.executable, "-m", "nitp_titan.cli"))
    assert done.returncode == 2
    assert 'did you mean "weight"?' in done.stderr
    assert "Traceback" not in done.stderr
    done = call(*words, entry=(sys.executable, "-m", "nitp_titan.cli"), NODE_RANK="1")
    assert done.stderr.startswith("nitp-titan train: RDZV_ENDPOINT or NODE_RANK is set without NNODES")


def test_the_launcher_is_light():
    code = "import sys, json, nitp_titan.launch; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(call("-c", code, entry=(sys.executable,)).stdout)
    assert not {"torch", "torchtitan"} & set(loaded)
