"""status.json: written whole, read by anyone, and a run that was killed is told from one that lives."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from nitp_titan.runs import status as module
from nitp_titan.runs.process import Process
from nitp_titan.runs.status import STATUS_FILE, StatusFile, is_alive, read_status


@pytest.fixture
def warnings():
    return []


def test_a_status_is_read_as_it_was_written(tmp_path, warnings):
    StatusFile(tmp_path, 100, warnings.append).write("interrupted", step=7, tokens=70, reason="SIGTERM", exit_code=0)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.steps, status.tokens) == ("interrupted", 7, 100, 70)
    assert (status.reason, status.exit_code, status.pid) == ("SIGTERM", 0, os.getpid())
    assert status.host == Process.here().host
    assert status.time >= status.started
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": "running"}', '{"state": "?", "step": 1, "steps": 1, '
                                  '"tokens": 1, "time": "", "started": ""}'])  # fmt: skip
def test_what_is_no_status_is_none(tmp_path, text):
    assert read_status(tmp_path) is None
    (tmp_path / STATUS_FILE).write_text(text)
    assert read_status(tmp_path) is None


def test_a_later_versions_fields_are_left(tmp_path, warnings):
    StatusFile(tmp_path, 1, warnings.append).write("completed", step=1, tokens=1)
    values = json.loads((tmp_path / STATUS_FILE).read_text())
    (tmp_path / STATUS_FILE).write_text(json.dumps(values | {"mood": "fine"}))
    assert read_status(tmp_path).state == "completed"


def test_a_status_that_cannot_be_written_is_warned_of_once_and_leaves_the_old_one(tmp_path, warnings, monkeypatch):
    file = StatusFile(tmp_path, 1, warnings.append)
    file.write("running", step=1, tokens=1)

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    for step in (2, 3):
        file.write("running", step=step, tokens=1)
    [line] = warnings
    assert "No space left on device" in line
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE]
    assert read_status(tmp_path).step == 1


def test_it_is_due_every_few_seconds(tmp_path, warnings, monkeypatch):
    file = StatusFile(tmp_path, 1, warnings.append)
    assert file.is_due
    file.write("running", step=1, tokens=1)
    assert not file.is_due
    later = time.monotonic() + module.EVERY_S
    monkeypatch.setattr(module.time, "monotonic", lambda: later)
    assert file.is_due


def test_who_lives(tmp_path, warnings):
    StatusFile(tmp_path, 1, warnings.append).write("running", step=1, tokens=1)
    mine = read_status(tmp_path)
    assert is_alive(tmp_path, mine)
    assert not is_alive(tmp_path, dataclasses.replace(mine, state="completed"))
    # Another process has got its number.
    assert not is_alive(tmp_path, dataclasses.replace(mine, began="1"))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not is_alive(tmp_path, dataclasses.replace(mine, pid=gone.pid))
    # Elsewhere the lock tells.
    elsewhere = dataclasses.replace(mine, machine="another", host="node-7")
    assert not is_alive(tmp_path, elsewhere)
    (tmp_path / "run.lock").touch()
    assert is_alive(tmp_path, elsewhere)
    os.utime(tmp_path / "run.lock", (time.time() - 3600,) * 2)
    assert not is_alive(tmp_path, elsewhere)


def test_a_zombie_is_dead():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = Process.here()
    alive = dataclasses.replace(here, pid=child.pid, began=_began(child.pid))
    assert alive.is_alive()
    child.kill()
    for _ in range(500):
        if not alive.is_alive():
            break
        time.sleep(0.01)
    assert not alive.is_alive()
    child.wait()


def _began(pid: int) -> str:
    from nitp_titan.runs import process

    return process._began(pid)
