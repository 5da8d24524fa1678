"""What a run says of itself in its folder: rank 0 holds the folder's lock and keeps its ``status.json``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan.tools.logging import logger

from nitp_titan.checkpoints.disk import disk_error
from nitp_titan.checkpoints.ranks import failure_of_first_rank
from nitp_titan.runs.lock import RunLock
from nitp_titan.runs.status import State, StatusFile
from nitp_titan.training.hooks import Hook, Moment

if TYPE_CHECKING:
    from nitp_titan.training.trainer import NITPTrainer


class RunRecord(Hook):
    """Of every rank, though rank 0's alone writes. It is one of the trainer's hooks once :meth:`follow` is called."""

    def __init__(self, folder: Path, steps: int, *, locks: bool = True):
        """Record nothing yet.

        Args:
            steps: ``training.steps``.
            locks: whether the folder is a run's, of which there is one at a time, and not a seed checkpoint's.
        """
        self._folder, self._steps, self._locks = folder, steps, locks
        self._lock: RunLock | None = None
        self._status: StatusFile | None = None
        self._trainer: NITPTrainer | None = None

    def claim(self, begin: Callable[[], None]) -> None:
        """Make the folder this run's, before anything is written there; called by all ranks once they can communicate.

        Args:
            begin: writes what the folder holds of a run from its beginning on; called on rank 0.

        Raises:
            RunError: on all ranks, where another run has the folder or rank 0 cannot write there.
        """
        error = failure_of_first_rank(lambda: self._claim(begin))
        if error is not None:
            raise disk_error(error, self._folder) if isinstance(error, OSError) else error

    def _claim(self, begin: Callable[[], None]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._locks:
            self._lock = RunLock.take(self._folder, logger.warning)
            self._status = StatusFile(self._folder, self._steps, logger.warning)
            self._write("running")
        begin()

    def follow(self, trainer: NITPTrainer) -> None:
        """Keep the status of a trainer's run."""
        self._trainer = trainer
        trainer.hooks.append(self)

    def begin_step(self, moment: Moment) -> None:
        """Note where a run that was resumed begins: its checkpoint is loaded by now."""
        if self._status is not None and self._status.is_due:
            self._write("running", moment.step - 1)

    def end_step(self, moment: Moment) -> None:
        """Note the step, every few seconds."""
        if self._status is not None and self._status.is_due:
            self._write("running", moment.step)

    def saved(self, moment: Moment) -> None:
        """Note the step of a checkpoint."""
        self._write("running", moment.step)

    def finish(self, state: State, reason: str | None = None, exit_code: int = 0) -> None:
        """Note how the run has ended, and give the folder back."""
        self._write(state, reason=reason, exit_code=exit_code)
        if self._lock is not None:
            self._lock.release()

    def _write(
        self, state: State, step: int | None = None, reason: str | None = None, exit_code: int | None = None
    ) -> None:
        if self._status is None:
            return
        trainer = self._trainer
        if step is None:
            step = trainer.step if trainer is not None else 0
        tokens = trainer.tokens_seen if trainer is not None else 0
        self._status.write(state, step=step, tokens=tokens, reason=reason, exit_code=exit_code)
