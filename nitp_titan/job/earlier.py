"""The resolved files of a run's earlier starts: kept beside the present one, and compared with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli

from nitp_titan.job.errors import quote
from nitp_titan.job.job import Job
from nitp_titan.job.write import resolved_toml

RESOLVED = "config.toml"
"""A run's resolved file; those of earlier starts are ``config.1.toml``, the oldest, ``config.2.toml`` and so on."""

_ONLY_LOGGING = ("metrics.", "profiler.", "job.description", "job.dump_folder", "debug.print_config")
_ONLY_LOGGING += ("debug.save_config_file", "debug.enable_structured_logging")


def changes_since(resolved: Path, job: Job) -> list[str]:
    """Return each setting of ``job`` that differs from a resolved file's, in words; none where there is no file.

    Settings that only change what is logged are left out, and so are keys that one of the two does not have.
    """
    if not resolved.is_file():
        return []
    try:
        differences = _differences(resolved.read_text(encoding="utf-8"), resolved_toml(job))
    except ValueError as error:
        return [f"not known: {resolved} of the earlier start is no TOML ({error})"]
    return [
        f"{name} = {quote(now)}, was {quote(then)}"
        for name, then, now in differences
        if not name.startswith(_ONLY_LOGGING)
    ]


def write_beside_earlier(job: Job, resolved: Path) -> None:
    """Write ``job`` to ``resolved``, its run's resolved file; the one of an earlier start is kept where it differs.

    A run that goes on from that very file, with the values that it has, leaves it as it is: it says where each value
    came from.
    """
    text = resolved_toml(job)
    if resolved.exists():
        then = resolved.read_bytes()
        goes_on_from_it = Path(job.file).absolute() == resolved.absolute()
        if then == text.encode() or (goes_on_from_it and not _differences(then.decode(), text)):
            return
        _write(_next_name(resolved), then)
    resolved.parent.mkdir(parents=True, exist_ok=True)
    _write(resolved, text.encode())


def _differences(then: str, now: str) -> list[tuple[str, Any, Any]]:
    """Return the keys of both texts that differ: ``table.key`` and the two values.

    Raises:
        ValueError: a text is no TOML.
    """
    before, after = dict(_values(tomli.loads(then))), dict(_values(tomli.loads(now)))
    return [(name, before[name], value) for name, value in after.items() if name in before and before[name] != value]


def _values(tables: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _next_name(resolved: Path) -> Path:
    numbers = [int(name) for path in resolved.parent.glob("config.*.toml") if (name := path.name[7:-5]).isdecimal()]
    return resolved.with_name(f"config.{max(numbers, default=0) + 1}.toml")


def _write(path: Path, content: bytes) -> None:
    """Write a file at once: a start that is killed here leaves no half of it."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    os.replace(beside, path)
