"""How a run ends that does not come to its last step: state, exit code, and the line that says why."""

from __future__ import annotations

from dataclasses import dataclass

from nitp_titan.checkpoints.disk import disk_error, is_of_the_disk
from nitp_titan.data.errors import DataError, shortened
from nitp_titan.job.errors import JobError
from nitp_titan.runs.status import State

BAD_INPUT, NOT_FINITE = 2, 3


@dataclass(frozen=True, slots=True)
class Ending:
    """What an exception makes of a run."""

    state: State
    exit_code: int
    reason: str
    """One line."""

    is_told: bool
    """Whether the exception's own text says all that there is to say, so that a traceback would only bury it."""


def ending(error: BaseException) -> Ending:
    """Return how a run ends with an exception. A class of exceptions has its code in ``exit_code``."""
    if isinstance(error, JobError | DataError):
        return Ending("failed", BAD_INPUT, _line(error), True)
    if code := getattr(error, "exit_code", 0):
        return Ending("stopped" if code == NOT_FINITE else "failed", code, _line(error), True)
    if isinstance(error, OSError) and is_of_the_disk(error):
        return Ending("failed", 1, _line(disk_error(error, "a file of the run")), True)
    return Ending("failed", 1, f"{type(error).__name__}: {_line(error)}", False)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[0], 500) if lines else type(error).__name__
