"""One process at a time in a run folder; a dead one's lock is taken over, whatever killed it and wherever it ran."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from nitp_titan.runs import lock as module
from nitp_titan.runs.errors import FolderInUseError
from nitp_titan.runs.lock import LOCK_FILE, RunLock, last_beat
from nitp_titan.runs.process import Process

HOLD = """
import sys, time
from pathlib import Path
from nitp_titan.runs.lock import RunLock
lock = RunLock.take(Path(sys.argv[1]), print)
print("held", flush=True)
input()
lock.release()
print("released", flush=True)
input()
"""


@contextlib.contextmanager
def holder(folder):
    """Another process that holds the lock; it lets it go at a line, and ends at a second one."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def said():
    return []


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.5)
    monkeypatch.setattr(module, "QUIET_S", 1.0)


def left_by(folder, **changes) -> None:
    values = dataclasses.asdict(Process.here()) | {"since": "yesterday"} | changes
    (folder / LOCK_FILE).write_text(json.dumps(values))


def test_a_living_holder_is_named_and_a_folder_is_free_once_it_has_let_it_go(tmp_path, said):
    with holder(tmp_path) as other:
        with pytest.raises(FolderInUseError) as refused:
            RunLock.take(tmp_path, said.append)
        host = Process.here().host
        assert f"{tmp_path}: another process trains in this folder (pid {other.pid} on {host}, since " in str(
            refused.value
        )
        assert refused.value.exit_code == 2
        assert "\n" not in str(refused.value)
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "released\n"
        assert not (tmp_path / LOCK_FILE).exists()
        RunLock.take(tmp_path, said.append).release()
    assert said == []


def test_a_killed_holder_is_no_holder(tmp_path, said):
    with holder(tmp_path) as other:
        other.kill()
        other.wait()
        lock = RunLock.take(tmp_path, said.append)
        [line] = said
        assert "taken over" in line
        assert f"pid {other.pid}" in line
        lock.release()


def test_one_who_is_about_to_end_is_waited_for(tmp_path, said):
    with holder(tmp_path) as other:
        threading.Timer(0.2, other.kill).start()
        RunLock.take(tmp_path, said.append).release()


def test_a_process_id_that_came_again_is_another_process(tmp_path, said):
    left_by(tmp_path, began="1")
    RunLock.take(tmp_path, said.append).release()
    assert len(said) == 1


def test_a_holder_elsewhere_that_gives_no_sign_of_life_is_dead(tmp_path, said):
    left_by(tmp_path, machine="another", host="node-7", pid=12)
    begin = time.monotonic()
    RunLock.take(tmp_path, said.append).release()
    assert time.monotonic() - begin >= 1
    watching, taken = said
    assert "pid 12 on node-7, since yesterday" in watching
    assert "taken over" in taken


def test_a_holder_elsewhere_that_gives_a_sign_of_life_lives(tmp_path, said):
    left_by(tmp_path, machine="another", host="node-7", pid=12)
    threading.Timer(0.5, os.utime, [tmp_path / LOCK_FILE]).start()
    with pytest.raises(FolderInUseError, match="pid 12 on node-7"):
        RunLock.take(tmp_path, said.append)


def test_a_file_system_without_locks_has_the_process_to_go_by(tmp_path, said, monkeypatch):
    def unsupported(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    # The parent of this process lives, and is not this process.
    from nitp_titan.runs import process

    left_by(tmp_path, pid=os.getppid(), began=process._began(os.getppid()))
    with pytest.raises(FolderInUseError):
        RunLock.take(tmp_path, said.append)
    left_by(tmp_path, pid=os.getppid(), began="1")
    RunLock.take(tmp_path, said.append).release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}'])
def test_a_file_that_says_nothing_is_free(tmp_path, said, text):
    (tmp_path / LOCK_FILE).write_text(text)
    RunLock.take(tmp_path, said.append).release()
    assert said == []


def test_a_holder_gives_signs_of_life(tmp_path, said, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    lock = RunLock.take(tmp_path, said.append)
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    time.sleep(0.5)
    assert time.time() - last_beat(tmp_path) < 10
    lock.release()
    lock.release()
    assert last_beat(tmp_path) is None
