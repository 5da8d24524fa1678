"""One process at a time in a run folder, and no lock that outlives its holder. Free of torch.

``run.lock`` says who holds it. The holder has a POSIX lock on it, which the kernel takes away with the process, however
it ends, and which NFS carries to other machines; it is not inherited by a fork. Where a file system has no such locks,
or does not carry them, two things tell a dead holder: on its own machine the kernel, and on others the lock's time,
which a living holder renews every few seconds. It is looked at as it changes, so that no two clocks are compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nitp_titan.runs.errors import FolderInUseError
from nitp_titan.runs.process import Process

LOCK_FILE = "run.lock"

BEAT_S = 5.0
"""Seconds between two signs of life."""

QUIET_S = 30.0
"""Seconds without one after which a holder that cannot be seen from here is taken for dead."""

PATIENCE_S = 4.0
"""Seconds that a living holder is given to end: ranks whose launcher was killed notice it within one."""

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """The right to write in a run folder; :meth:`take` gets it."""

    def __init__(self, path: Path, file: int):
        self._path, self._file = path, file
        self._released = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._beats.start()

    @classmethod
    def take(cls, folder: Path, say: Callable[[str], None]) -> RunLock:
        """Take the lock of a folder; wait for a holder that may be dead or about to end.

        Args:
            say: is told in a line when the lock of a dead run is taken over, or looked at for long.

        Raises:
            FolderInUseError: a living process has it.
            OSError: the folder cannot be written.
        """
        path = folder / LOCK_FILE
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                left = _wait(file, folder, say)
                if _is_still(path, file):
                    _write(file)
                    if left is not None:
                        say(f"The lock of a run that ended without a word ({left}) is taken over")
                    return cls(path, file)
            except BaseException:
                os.close(file)
                raise
            # Its holder has removed it in the meantime.
            os.close(file)

    def release(self) -> None:
        """Give it back, and remove the file."""
        if self._released.is_set():
            return
        self._released.set()
        self._beats.join()
        with contextlib.suppress(OSError):
            # Before it is unlocked: whoever waits for it looks whether it is still there.
            self._path.unlink()
        os.close(self._file)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def last_beat(folder: Path) -> float | None:
    """Return when a run last gave a sign of life, in seconds since the epoch; None where no lock is there."""
    try:
        return (folder / LOCK_FILE).stat().st_mtime
    except OSError:
        return None


def _wait(file: int, folder: Path, say: Callable[[str], None]) -> str | None:
    """Wait until the lock is ours; return who has left it behind, None if it was free.

    Raises:
        FolderInUseError: it stays another's.
    """
    begin, first_beat, said = time.monotonic(), os.fstat(file).st_mtime_ns, False
    while True:
        locked = _lock(file)
        holder, since = _read(file)
        described = f"{holder}, since {since}"
        alive = holder.is_alive() if holder is not None else False
        if locked and not alive and alive is not None:
            return described if holder is not None else None
        waited = time.monotonic() - begin
        beats = os.fstat(file).st_mtime_ns != first_beat
        if alive is None:
            if not said:
                said = True
                say(f"{folder} has a lock of {described}: looked at for up to {QUIET_S:.0f} s, whether that run lives")
            if locked and not beats and waited >= QUIET_S:
                return described
        patience = QUIET_S if alive is None else PATIENCE_S
        if (alive is None and beats) or waited >= patience:
            raise FolderInUseError(
                f"{folder}: another process trains in this folder ({described}); end that one first, or give another "
                "job.dump_folder"
            )
        if locked:
            # Somebody may be watching this file as we are.
            with contextlib.suppress(OSError):
                fcntl.lockf(file, fcntl.LOCK_UN)
        time.sleep(0.2)


def _lock(file: int) -> bool:
    """Try to lock; return whether no other has it, as far as the file system knows."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _NO_LOCKS_HERE:
            raise
    return True


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _write(file: int) -> None:
    text = json.dumps(dataclasses.asdict(Process.here()) | {"since": time.strftime("%Y-%m-%d %H:%M:%S")})
    os.ftruncate(file, 0)
    os.pwrite(file, text.encode(), 0)


def _read(file: int) -> tuple[Process | None, str]:
    try:
        values: Any = json.loads(os.pread(file, 4096, 0))
        return Process.read(values), str(values.get("since"))
    except (ValueError, AttributeError):
        return None, "?"
