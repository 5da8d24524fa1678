"""The lines of a ``metrics.jsonl`` with which a run that starts again goes on. Free of torch."""

from __future__ import annotations

import json
import os
from pathlib import Path


def keep_until(path: Path, last_step: int) -> int:
    """Leave a file's lines of the steps up to ``last_step``, each step once; return how many lines were dropped.

    What is no record is dropped, too: a line that a killed run left half written. Of a step that stands there twice
    the later line stays, and what an earlier start wrote after it goes. The file is replaced at once or not at all.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    kept: list[tuple[int, bytes]] = []
    for line in lines:
        step = _step_of(line)
        if step is None:
            continue
        while kept and kept[-1][0] >= step:
            kept.pop()
        if step <= last_step:
            kept.append((step, line))
    dropped = len(lines) - len(kept)
    if dropped:
        beside = path.with_name(f".{path.name}.new")
        try:
            with open(beside, "wb") as file:
                file.writelines(line for _, line in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
    return dropped


def set_aside(path: Path, last_step: int) -> Path | None:
    """Rename a file that has lines of later steps than ``last_step`` to ``NAME.1.SUFFIX``, ...; return where it is."""
    try:
        steps = [_step_of(line) for line in path.read_bytes().splitlines(keepends=True)]
    except FileNotFoundError:
        return None
    if not any(step is not None and step > last_step for step in steps):
        return None
    number = 1
    while (place := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(place)
    return place


def _step_of(line: bytes) -> int | None:
    """Return the step of a whole line; None for what is no record."""
    if not line.endswith(b"\n"):
        return None
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
