"""How a run of two ranks ends: by signals to the launcher, to one rank, to all; by a rank that is lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.commands import call, losses
from tests.helpers.signalled import small_job, started

TRAIN = (sys.executable, "-m", "nitp_titan.cli", "train", "train_configs/debug.toml", "--ngpu", "2")
LAYOUTS = {
    "fsdp": (),
    "tp": ("--parallelism.tensor_parallel_degree=2",),
    "pp": (
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.pipeline_parallel_schedule=1F1B",
        "--parallelism.pipeline_parallel_microbatch_size=1",
    ),
}
FOR_EVER = "--training.steps=100000"


def status(folder):
    return json.loads((folder / "status.json").read_text())


def test_goes_on_as_if_undisturbed(tmp_path):
    """SIGTERM to the launcher, SIGUSR1 to one rank alone; then to the end, and as a whole run."""
    folder, steps = tmp_path / "run", 0
    for name in ("SIGTERM", "SIGUSR1"):
        log = tmp_path / name
        with started(*TRAIN, *small_job(folder, FOR_EVER), log=log) as run:
            run.wait_for(f"step: {steps + 3:2}")
            pid = run.process.pid if name == "SIGTERM" else run.children()[-1]
            os.kill(pid, getattr(signal, name))
            assert run.ended() == 0, run.said
            last = run.said.splitlines()[-1]
        ended = status(folder)
        assert f"Interrupted by {name} at step {ended['step']} of 100000; saved step-{ended['step']}." in last
        assert (ended["state"], ended["tokens"]) == ("interrupted", ended["step"] * 2 * 4 * 64)
        assert ended["step"] >= steps + 3
        assert "Traceback" not in run.said
        steps = ended["step"]
        assert (folder / "checkpoint" / f"step-{steps}" / ".metadata").exists()
    job = f"--training.steps={steps + 2}"
    assert call(*small_job(folder, job), entry=TRAIN).returncode == 0
    assert call(*small_job(tmp_path / "whole", job), entry=TRAIN).returncode == 0
    assert losses(folder) == losses(tmp_path / "whole")
    assert status(folder)["state"] == "completed"


@pytest.mark.parametrize("layout", ["tp", "pp"])
def test_all_ranks_of_a_layout_stop_after_one_step(tmp_path, layout):
    folder = tmp_path / "run"
    with started(*TRAIN, *small_job(folder, FOR_EVER, *LAYOUTS[layout]), log=tmp_path / "log", LOG_RANK="0,1") as run:
        run.wait_for("step:  2")
        # Ctrl-C in a terminal reaches the whole group; a scheduler may signal the ranks themselves as well.
        run.kill_group(signal.SIGINT)
        for pid in run.children():
            os.kill(pid, signal.SIGINT)
        assert run.ended() == 0, run.said
    step = status(folder)["step"]
    assert status(folder)["state"] == "interrupted"
    assert (folder / "checkpoint" / f"step-{step}" / ".metadata").exists()
    assert "Traceback" not in run.said


def test_a_second_signal_ends_all_at_once(tmp_path):
    with started(*TRAIN, *small_job(tmp_path / "run", FOR_EVER), log=tmp_path / "log") as run:
        run.wait_for("step:  1")
        ranks = run.children()
        # One rank stands still, so that the others wait for it.
        os.kill(ranks[1], signal.SIGSTOP)
        run.kill(signal.SIGTERM)
        time.sleep(1.5)
        begin = time.monotonic()
        run.kill(signal.SIGTERM)
        assert run.ended() == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 5
        assert "A second signal, SIGTERM" in run.said
    end = time.monotonic() + 10
    while any(lives(rank) for rank in ranks):
        assert time.monotonic() < end
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """Whether a process runs; a dead one may be there until somebody asks for its code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_lost_rank_ends_the_run_and_the_next_start_goes_on(tmp_path):
    folder = tmp_path / "run"
    job = small_job(folder, FOR_EVER, "--checkpoint.interval=2")
    with started(*TRAIN, *job, log=tmp_path / "log") as run:
        run.wait_for("step:  5")
        os.kill(run.children()[1], signal.SIGKILL)
        assert run.ended(60) == 1
        said = run.said
    ended = status(folder)
    assert (ended["state"], ended["exit_code"], ended["reason"]) == ("failed", 1, "rank 1: ended by SIGKILL")
    assert "rank 1: ended by SIGKILL" in said
    # All of it is killed, launcher first: its ranks end by themselves, and the folder is free again.
    with started(*TRAIN, *job, log=tmp_path / "again") as run:
        run.wait_for("Training starts at step ")
        run.wait_for("step: ")
        assert "Training starts at step 1\n" not in run.said
        run.kill(signal.SIGKILL)
        with started(*TRAIN, *job, log=tmp_path / "third") as third:
            third.wait_for("Training starts at step ")
            third.wait_for("step: ")
            third.kill(signal.SIGTERM)
            assert third.ended() == 0, third.said


def test_a_folder_in_use_is_refused_by_all_ranks(tmp_path):
    job = small_job(tmp_path / "run", FOR_EVER)
    with started(*TRAIN, *job, log=tmp_path / "log") as run:
        run.wait_for("step:  1")
        second = call(*job, entry=TRAIN)
        assert second.returncode == 2
        assert second.stderr.count("another process trains in this folder (pid ") == 1, second.stderr
        assert "Traceback" not in second.stderr
        assert run.process.poll() is None
        assert status(tmp_path / "run")["state"] == "running"
