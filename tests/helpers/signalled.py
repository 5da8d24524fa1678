"""Training processes that are sent signals while they train."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.commands import ROOT

TRAIN = (sys.executable, "-m", "nitp_titan.train", "--job.config_file=train_configs/debug.toml")


class Started:
    """A command that runs in a process group of its own; its output is read at the end."""

    def __init__(self, words: tuple[str, ...], log: Path, **environment: str):
        unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        env = {name: value for name, value in os.environ.items() if name not in unset} | environment
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str, seconds: float = 120) -> None:
        """Wait until it has said this."""
        end = time.monotonic() + seconds
        while words not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    def kill(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill_group(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def ended(self, seconds: float = 120) -> int:
        """Wait for the end; return the exit code."""
        return self.process.wait(timeout=seconds)

    def children(self) -> list[int]:
        """The process ids of its children, in the order in which they were started."""
        found = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            found += [int(pid) for pid in (task / "children").read_text().split()]
        return sorted(found)


@contextlib.contextmanager
def started(*words: str, log: Path, **environment: str) -> Iterator[Started]:
    """A command that is running, and does not outlive the context."""
    run = Started(words, log, **environment)
    try:
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):
            for child in run.children() if run.process.poll() is None else []:
                os.kill(child, 9)
            os.killpg(run.process.pid, 9)
        run.process.wait()


def small_job(folder: Path, *words: str) -> tuple[str, ...]:
    """Options of a job of short steps, of which one is a checkpoint's once in a while."""
    return (
        f"--job.dump_folder={folder}",
        "--training.seq_len=64",
        "--training.local_batch_size=4",
        "--metrics.log_freq=1",
        "--lr_scheduler.total_steps=100000",
        "--checkpoint.interval=1000",
        "--checkpoint.no-last_save_model_only",
        *words,
    )
