"""All ranks end after the same step when any of them has had a signal, at no cost on a step.

A rank may have begun a step that another has not, and must finish it with the others. So they stop after the last step
that any of them has begun, which they find through the store that they met at, in threads of their own: no collective
operation is added, and no step waits for one. A rank that hears of the request begins no step until the answer is
there, and says which was the last that it has begun. The largest is the answer: no rank has begun a later one.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.tools.logging import logger

from nitp_titan.checkpoints.manager import CheckpointManager
from nitp_titan.training.signals import Signals, before_the_first_step

if TYPE_CHECKING:
    from nitp_titan.training.trainer import NITPTrainer

AGREEMENT_S = 300.0
"""Seconds after which a rank gives up on the others' answer: threads of living ranks take well under one."""

_REQUEST, _STOP, _ANSWERS = "request", "stop_after", "answers"


class Interruption:
    """Whether the run is to end before its time. Without signals it never is."""

    def __init__(self, signals: Signals | None = None):
        self.signal: str | None = None
        """What ended the run: the name of a signal, once the ranks have stopped."""

        self.outcome = ""
        """What has become of the run's last step, in a line, once it is saved."""

        self._signals = signals
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._begun, self._frozen, self._closed = -1, False, False
        self._stop_after: int | None = None
        self._answered = threading.Event()
        self._name = ""

    def join(self, store: Any, rank: int, world_size: int) -> None:
        """Agree with other ranks from now on.

        Args:
            store: torch.distributed's, of all ranks.
        """
        if self._signals is None or world_size == 1:
            return
        # A connection of its own: the main thread's may wait for what another rank does in a step.
        self._store, self._rank, self._world_size = _Keys(store.clone()), rank, world_size
        self._thread = threading.Thread(target=self._listen, name="interruption", daemon=True)
        self._thread.start()

    def stops(self, step: int) -> bool:
        """Whether the run ends after a step. Asked by every rank before it begins the next one."""
        if self._signals is None:
            return False
        if self._thread is None:
            self.signal = self._signals.first
            return self.signal is not None
        with self._lock:
            if not self._frozen:
                self._begun = step + 1
                return False
        if not self._answered.wait(AGREEMENT_S):
            raise RuntimeError(f"The ranks have not agreed in {AGREEMENT_S:.0f} s on the step to stop after")
        if self._stop_after is not None and step >= self._stop_after:
            self.signal = self._name
        return self.signal is not None

    def close(self) -> None:
        """Take no part any more: this rank begins no further step."""
        if self._thread is None or self._closed:
            return
        self.abandon()
        if not self._answered.is_set():
            # It has come to its last step, which is the answer to whoever asks now.
            try:
                self._store.set(_STOP, str(self._begun))
            except Exception:
                return

    def abandon(self) -> None:
        """Ask the store nothing any more, since the run has failed: a thread in it would abort a process that ends."""
        if self._thread is None or self._closed:
            return
        self._closed = True
        assert self._signals is not None
        self._signals.noted.set()
        self._thread.join(timeout=5)

    def _listen(self) -> None:
        try:
            self._wait_for_a_request()
        except Exception as error:
            logger.debug(f"No agreement on an interruption: {error}")
            self._answered.set()

    def _wait_for_a_request(self) -> None:
        assert self._signals is not None
        # All ranks ask one store: some two thousand questions a second at most.
        period = max(0.5, self._world_size / 2000)
        while not self._closed:
            self._signals.noted.wait(period)
            if self._closed or self._signals.closed:
                return
            if own := self._signals.first:
                self._store.set(_REQUEST, own)
            if own or self._store.has(_REQUEST):
                break
        else:
            return
        self._name = self._store.get(_REQUEST)
        with self._lock:
            self._frozen, begun = True, self._begun
        self._store.set(f"{_ANSWERS}/{self._rank}", str(begun))
        self._store.count(_ANSWERS)
        logger.info(f"{self._name}: the run ends after the step that its ranks are in; a second one ends it at once")
        pause = threading.Event()
        while not self._store.has(_STOP):
            if self._closed:
                return
            if self._rank == 0 and self._store.count(_ANSWERS, 0) == self._world_size:
                answers = self._store.get_all([f"{_ANSWERS}/{rank}" for rank in range(self._world_size)])
                self._store.set(_STOP, str(max(int(answer) for answer in answers)))
            pause.wait(0.02 * max(1.0, self._world_size / 200))
        self._stop_after = int(self._store.get(_STOP))
        self._answered.set()


class _Keys:
    """A store's keys of this purpose."""

    def __init__(self, store: Any):
        self._store = store

    def _name(self, key: str) -> str:
        return f"nitp_titan/interruption/{key}"

    def set(self, key: str, value: str) -> None:
        self._store.set(self._name(key), value)

    def get(self, key: str) -> str:
        return self._store.get(self._name(key)).decode()

    def get_all(self, keys: list[str]) -> list[str]:
        if not self._store.has_extended_api():
            return [self.get(key) for key in keys]
        # At once, because a large run has thousands.
        return [value.decode() for value in self._store.multi_get([self._name(key) for key in keys])]

    def has(self, key: str) -> bool:
        return self._store.check([self._name(key)])

    def count(self, key: str, more: int = 1) -> int:
        return self._store.add(self._name(f"{key}/count"), more)


def end_interrupted(trainer: NITPTrainer) -> str:
    """Save all of the state of a run that a signal has stopped; return the line that says how to go on.

    Raises:
        DiskError: it cannot be saved.
    """
    name, step, checkpointer = trainer.interruption.signal, trainer.step, trainer.checkpointer
    if not trainer.steps_run:
        return before_the_first_step(name, " of this start")
    saved = False
    if isinstance(checkpointer, CheckpointManager):
        try:
            checkpointer.maybe_wait_for_staging()
            checkpointer.maybe_wait_for_saving()
        except (Exception, CheckpointException) as error:
            # The process that saves in the background may have had the same signal.
            logger.warning(f"The checkpoint that was being saved in the background is lost: {error!r:.200}")
            checkpointer.staging_future = checkpointer.save_future = None
        saved = checkpointer.save_now(step)
    begin = f"Interrupted by {name} at step {step} of {trainer.config.training.steps}"
    if saved:
        return f"{begin}; saved step-{step}. The same command goes on from there"
    return f"{begin}; nothing was saved, because the job saves no checkpoints (checkpoint.enable, checkpoint.load_only)"
