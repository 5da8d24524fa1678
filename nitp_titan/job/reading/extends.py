"""A job file over the files that it extends: ``extends = "other.toml"`` or a list of files, at the top of a file.

Names are relative to the file that says them. A file overrides what it extends key by key; of several files a later one
wins, each with what it extends in its turn.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from nitp_titan.job.draft import Layer
from nitp_titan.job.errors import Problem, quote
from nitp_titan.job.reading.file import EXTENDS, Bad, nearest_file, read_one_file


class ReadFile(NamedTuple):
    """A job file with all that it extends."""

    layer: Layer
    """Each setting has the file and line in which it stands."""
    bad: Bad
    """Keys whose value is wrong where it counts."""
    problems: list[Problem]
    """Everything that is wrong with any of the files."""
    whole: bool
    """False where a file or a part of the chain is missing: what the job says is not known."""


def read_file(path: str | Path) -> ReadFile:
    """Read a job file and the files that it extends."""
    return _read(Path(path), ())


def _read(path: Path, children: tuple[Path, ...]) -> ReadFile:
    one = read_one_file(path)
    chain = (*children, path)
    layer: Layer = {}
    bad: Bad = set()
    problems: list[Problem] = []
    whole = one.whole
    for name in one.parents:
        parent = _tidy(path.parent / name)
        if message := _why_not(parent, chain):
            hint = "" if os.path.exists(parent) else nearest_file(parent, written=name)
            problems.append(Problem(str(path), EXTENDS, f"found {quote(name)}, {message}", hint, one.extends_line))
            whole = False
            continue
        read = _read(parent, chain)
        layer, bad = _over(read.layer, read.bad, layer, bad)
        problems += read.problems
        whole = whole and read.whole
    return ReadFile(*_over(one.layer, one.bad, layer, bad), [*problems, *one.problems], whole)


def _over(layer: Layer, bad: Bad, below: Layer, below_bad: Bad) -> tuple[Layer, Bad]:
    """Merge what a file says over what it extends; a wrong value hides the one below it, too."""
    kept = {key: setting for key, setting in below.items() if key not in bad}
    return kept | layer, (below_bad - layer.keys()) | bad


def _why_not(parent: Path, chain: tuple[Path, ...]) -> str:
    """Return why a file cannot be extended, or an empty string."""
    files = [os.path.realpath(file) for file in chain]
    if (real := os.path.realpath(parent)) in files:
        cycle = [*chain[files.index(real) :], parent]
        return f"which closes a cycle: {' -> '.join(str(file) for file in cycle)}"
    if os.path.isdir(parent):
        return "which is a folder"
    return "" if os.path.isfile(parent) else "no such file"


def _tidy(path: Path) -> Path:
    """Return ``a/b/../c.toml`` as ``a/c.toml``, unless ``b`` is a link to somewhere else."""
    short = Path(os.path.normpath(path))
    return short if os.path.realpath(short) == os.path.realpath(path) else path
