"""Which process a run is, and whether it still lives. Free of torch."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Process:
    """A process that no later one is taken for: process ids come again, in containers after seconds."""

    host: str
    pid: int
    began: str
    """When the kernel started it, in its own units; "" where the kernel does not tell."""

    machine: str
    """The machine's boot and the process's namespace: a pid means something within these alone."""

    @classmethod
    def here(cls) -> Process:
        """Return this process."""
        return cls(socket.gethostname(), os.getpid(), _began(os.getpid()) or "", _machine())

    @classmethod
    def read(cls, values: dict[str, Any]) -> Process | None:
        """Return the process that a file tells of; None where it tells of none."""
        try:
            return cls(str(values["host"]), int(values["pid"]), str(values["began"]), str(values["machine"]))
        except (KeyError, TypeError, ValueError):
            return None

    def is_alive(self) -> bool | None:
        """Whether it lives; None where it ran on another machine (or container), which cannot be seen from here."""
        if self.machine != _machine():
            return None
        if self.began:
            return _began(self.pid) == self.began
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


def _began(pid: int) -> str | None:
    """Return when a living process was started, "" where the kernel does not tell, None if it lives no more."""
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        # The name stands in parentheses, and may hold any character.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
