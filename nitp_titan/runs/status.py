"""``status.json`` in a run folder: what state the run is in, for people and for whatever starts it. Free of torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from nitp_titan.runs.lock import QUIET_S, last_beat
from nitp_titan.runs.process import Process

STATUS_FILE = "status.json"

State = Literal["running", "completed", "interrupted", "stopped", "failed"]

EVERY_S = 10.0
"""Seconds between two notes of a run's step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """What a run says of itself."""

    state: State
    """running; completed; interrupted: by a signal; stopped: numbers are not finite; failed: anything else.

    A run that was killed says no more than that it is running: see :func:`is_alive`.
    """

    step: int
    """The last step that was trained, over restarts."""

    steps: int
    """``training.steps``."""

    tokens: int
    """Tokens that were trained on, over restarts and ranks."""

    time: str
    """When this was written, ISO 8601."""

    started: str
    """When this start of the run began."""

    reason: str | None = None
    """Why it is not running any more, in a line."""

    exit_code: int | None = None
    """What rank 0 ended with; None while it runs."""

    host: str = ""
    pid: int = 0
    began: str = ""
    machine: str = ""

    @property
    def process(self) -> Process:
        """Rank 0's process."""
        return Process(self.host, self.pid, self.began, self.machine)


def read_status(folder: Path) -> Status | None:
    """Return what a run says of itself; None where there is no ``status.json``, or one that is not ours."""
    try:
        values = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(Status)}
        status = Status(**{name: value for name, value in values.items() if name in names})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return status if status.state in get_args(State) else None


def is_alive(folder: Path, status: Status) -> bool:
    """Whether the process of a status that says "running" still lives.

    On this machine the kernel knows it. On another the run's lock tells, which a living run touches every few seconds:
    it is taken for dead if it has been quiet for half a minute.
    """
    if status.state != "running":
        return False
    alive = status.process.is_alive()
    if alive is not None:
        return alive
    beat = last_beat(folder)
    return beat is not None and time.time() - beat < 2 * QUIET_S


def now() -> str:
    """Return the time as ``status.json`` has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class StatusFile:
    """Writes a run's status: whole or not at all, and never an error but the first one's line."""

    def __init__(self, folder: Path, steps: int, warn: Callable[[str], None]):
        self._path, self._steps, self._warn = folder / STATUS_FILE, steps, warn
        self._started, self._process = now(), Process.here()
        self._written, self._warned = 0.0, False

    @property
    def is_due(self) -> bool:
        """Whether it is time to write again that the run is running."""
        return time.monotonic() - self._written >= EVERY_S

    def write(
        self, state: State, *, step: int, tokens: int, reason: str | None = None, exit_code: int | None = None
    ) -> None:
        """Replace the status."""
        status = Status(
            state=state,
            step=step,
            steps=self._steps,
            tokens=tokens,
            time=now(),
            started=self._started,
            reason=reason,
            exit_code=exit_code,
            **dataclasses.asdict(self._process),
        )
        self._written = time.monotonic()
        try:
            replace(self._path, status)
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(f"{self._path} cannot be written: {error.strerror or error}; the run goes on without it")


def replace(path: Path, status: Status) -> None:
    """Write a status beside the old one, then put it in its place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(dataclasses.asdict(status), indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
