"""A signal ends a run of one process after its step, saved, with exit code 0; the next start goes on as if nothing."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import sys
import time

from nitp_titan import train
from nitp_titan.training.signals import NAMES, Signals
from tests.helpers.commands import call, losses
from tests.helpers.signalled import TRAIN, small_job, started


def status(folder):
    return json.loads((folder / "status.json").read_text())


def test_a_signalled_run_is_saved_and_goes_on_as_if_undisturbed(tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    with started(*TRAIN, *small_job(folder, "--training.steps=100000"), log=tmp_path / "log") as run:
        run.wait_for("step:  3")
        assert status(folder)["state"] == "running"
        # As from a terminal, or `timeout`: the group has it, and the process once more.
        run.kill(signal.SIGTERM)
        run.kill_group(signal.SIGTERM)
        assert run.ended() == 0
        last = run.said.splitlines()[-1]
    ended = status(folder)
    step = ended["step"]
    assert f"Interrupted by SIGTERM at step {step} of 100000; saved step-{step}. The same command goes on" in last
    assert "Traceback" not in run.said
    assert (ended["state"], ended["exit_code"]) == ("interrupted", 0)
    assert ended["tokens"] == step * 4 * 64
    assert not (folder / "run.lock").exists()
    assert [path.name for path in (folder / "checkpoint").iterdir()] == [f"step-{step}"]

    assert call(*small_job(folder, f"--training.steps={step + 3}"), entry=TRAIN).returncode == 0
    assert call(*small_job(whole, f"--training.steps={step + 3}"), entry=TRAIN).returncode == 0
    assert losses(folder) == losses(whole)
    assert status(folder)["state"] == "completed"
    assert status(folder)["tokens"] == status(whole)["tokens"]


ENDLESS = """
import sys, time
from nitp_titan.training.signals import Signals
signals = Signals()
print("listening", flush=True)
while signals.first is None:
    time.sleep(0.01)
print("first", signals.first, flush=True)
time.sleep(60)
"""


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    with started(sys.executable, "-c", ENDLESS, log=tmp_path / "log") as run:
        run.wait_for("listening")
        run.kill(signal.SIGINT)
        run.wait_for("first SIGINT")
        # Within a second it is the same request, come twice.
        run.kill(signal.SIGINT)
        time.sleep(1.2)
        assert run.process.poll() is None
        run.kill(signal.SIGTERM)
        assert run.ended(5) == 128 + signal.SIGTERM
        assert "A second signal, SIGTERM" in run.said


def test_a_signal_before_anything_is_trained_ends_the_process_with_0(tmp_path, capsys, monkeypatch):
    before = [signal.getsignal(getattr(signal, name)) for name in NAMES]

    def build(job):
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(train, "build", build)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert train.main(["--job.config_file=train_configs/debug.toml", f"--job.dump_folder={tmp_path}"]) == 0
    assert capsys.readouterr().out == (
        "Interrupted by SIGUSR1 before the first step: nothing is lost. The same command goes on\n"
    )
    assert [signal.getsignal(getattr(signal, name)) for name in NAMES] == before
    assert list(tmp_path.iterdir()) == []


def test_signals_are_heard_where_a_process_has_many_files_open(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    plain = os.pipe

    def high() -> tuple[int, int]:
        low = plain()
        found = tuple(fcntl.fcntl(number, fcntl.F_DUPFD, 1100) for number in low)
        for number in low:
            os.close(number)
        return found

    monkeypatch.setattr(os, "pipe", high)
    signals = Signals()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.noted.wait(10)
        assert signals.first == "SIGUSR1"
    finally:
        signals.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
