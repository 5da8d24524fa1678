"""What a run was that saved a checkpoint, against what the run is that goes on from it. Free of torch.

A fingerprint is a table of tables, group -> key -> value. ``job/fingerprint.py`` makes it of a job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from nitp_titan.checkpoints.keys import Change

Fingerprint = Mapping[str, Mapping[str, Any]]

REFUSED: tuple[str, ...] = get_args(Change)
"""Groups in which a difference is refused unless ``checkpoint.allow_changes`` names the group."""

SAID = ("nitp", "schedule", "batch", "precision", "layout", "versions")
"""Groups in which a difference is said. Others tell where a run comes from, and are not compared."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that is another one now."""

    group: str
    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} (was {_written(self.then)}, is {_written(self.now)})"

    @property
    def refused(self) -> bool:
        """Whether it is of a group that a run does not go on with by itself."""
        return self.group in REFUSED


def differences(then: Fingerprint, now: Fingerprint) -> list[Difference]:
    """Compare, group by group; what one of the two does not know, as one of another version, is not compared."""
    return [
        Difference(group, key, then[group][key], now[group][key])
        for group in (*REFUSED, *SAID)
        if group in then and group in now
        for key in now[group]
        if key in then[group] and then[group][key] != now[group][key]
    ]


def refusals(found: Iterable[Difference], allowed: Iterable[str]) -> list[str]:
    """Return a sentence for each group in which something differs that is not allowed to."""
    found, allowed = list(found), set(allowed)
    sentences = []
    for group in REFUSED:
        if group not in allowed and (of_group := [str(one) for one in found if one.group == group]):
            what = "other data" if group == "data" else f"another {group}"
            restore = f'restore it, or set checkpoint.allow_changes = ["{group}"]'
            sentences.append(f"is of {what}: {', '.join(of_group)}; {restore}")
    return sentences


def _written(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
