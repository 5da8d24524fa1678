"""The signals that end a run: the first one is noted, a second one ends the process at once. Free of torch."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from types import FrameType

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
"""What asks a run to end: schedulers, Ctrl-C, and Slurm's notice of a job's end."""

SAME_S = 1.0
"""Seconds in which further signals count as the first one, because one request may arrive twice: ``timeout`` and Slurm
signal every process of a group, and a launcher passes on what its workers have had already."""


class Interrupted(BaseException):
    """A signal came before there was anything to save; its name is the message."""


def before_the_first_step(name: object, of: str = "") -> str:
    """Return the line that says that a signal has ended a run that had nothing to save."""
    return f"Interrupted by {name} before the first step{of}: nothing is lost. The same command goes on"


class Signals:
    """Listens from its making to :meth:`close`, which give the signals back to who had them before.

    A thread of its own listens, because the main one may wait in a collective operation for long, where Python calls
    no handler. It also ends a rank whose launcher has died, since nobody would ever end it.
    """

    def __init__(self) -> None:
        self.first: str | None = None
        """The name of the first signal."""

        self.noted = threading.Event()
        """Set with ``first``, and by :meth:`close`."""

        self.raising = False
        """Whether the first signal raises :class:`Interrupted` in the main thread: as long as nothing is trained."""

        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self.closed = False
        self._numbers = [getattr(signal, name) for name in NAMES]
        self._before = {number: signal.signal(number, self._handle) for number in self._numbers}
        for number in self._numbers:
            # What is being read or written goes on, in libraries too that do not expect to be interrupted.
            signal.siginterrupt(number, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more."""
        if self.closed:
            return
        self.closed = True
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")
        self._thread.join()
        self.noted.set()
        os.close(self._read)
        os.close(self._write)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Python's handler, in the main thread; the thread below is told by the kernel's."""
        if self.raising:
            self.raising = False
            raise Interrupted(signal.Signals(number).name)

    def _listen(self) -> None:
        since = 0.0
        # select() takes no file above number 1,023, and a corpus of many shards has that many.
        ready = select.poll()
        ready.register(self._read, select.POLLIN)
        while not self.closed:
            if ready.poll(500):
                for number in os.read(self._read, 64):
                    if number not in self._numbers:
                        continue
                    if self.first is None:
                        self.first, since = signal.Signals(number).name, time.monotonic()
                        self.noted.set()
                    elif time.monotonic() - since >= SAME_S:
                        end_at_once(f"A second signal, {signal.Signals(number).name}: ended at once", 128 + number)
            if self._parent is not None and os.getppid() != self._parent:
                end_at_once("The launcher of this rank is gone: ended at once", 1)


def end_at_once(message: str, code: int) -> None:
    """End this process from any thread, whatever the others do."""
    with contextlib.suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)
    os._exit(code)
