"""What is wrong with a job, one line a problem, and all of it at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to change in a job file or on the command line."""

    where: str
    """The job file's path, or ``"command line"``."""
    key: str
    """``[table] key`` in a file, ``--table.key`` on the command line; empty where the whole file is meant."""
    message: str
    """What was found and what was expected."""
    hint: str = ""
    """The nearest valid name, or what to do instead."""
    line: int | None = None
    """Line of the key in the file, where known."""

    def __str__(self) -> str:
        where = f"{self.where}:{self.line}" if self.line else self.where
        parts = [where, self.key, self.message] if self.key else [where, self.message]
        return ": ".join(parts) + (f"; {self.hint}" if self.hint else "")


class JobError(ValueError):
    """A job that cannot run. ``problems`` holds everything that was found; ``str()`` is one line for each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        unique = dict.fromkeys(problems)
        # In the order in which a reader meets them: each file from top to bottom, then the command line.
        files = list(dict.fromkeys(problem.where for problem in unique))
        self.problems = sorted(unique, key=lambda p: (p.where == COMMAND_LINE, files.index(p.where), p.line or 0))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def quote(value: object) -> str:
    """Return ``value`` as one would write it in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return '"none"'
    if isinstance(value, str):
        return '"' + value.replace("\n", "\\n") + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(quote(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {quote(item)}" for key, item in value.items()) + "}"
    return str(value)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the valid name that ``name`` was probably meant to be, or an empty string."""
    by_folded = {candidate.casefold(): candidate for candidate in names}
    matches = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[matches[0]] if matches else ""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint that names the nearest valid name, or an empty string."""
    match = nearest(name, names)
    return f'did you mean "{match}"?' if match else ""


def one_of(names: Iterable[str]) -> str:
    """Return the valid names as a phrase for "expected ..."."""
    return "one of " + ", ".join(quote(name) for name in names)
