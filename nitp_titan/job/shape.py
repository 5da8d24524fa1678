"""``[model.shape]``: what a job changes in the shape of a flavor of ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote
from nitp_titan.job.models import OURS
from nitp_titan.models.flavors import FLAVORS, Shape

TABLE = "model.shape"


def changes_of(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the table that are set."""
    return {key: value for key, value in table.items() if value is not None}


def shape_of(module: str, flavor: str, table: Mapping[str, Any]) -> Shape | None:
    """Return the flavor's shape with the table's changes; None for a model that is not ours."""
    return dataclasses.replace(FLAVORS[flavor].shape, **changes_of(table)) if module == OURS else None


def drop_unchanged(draft: Draft) -> None:
    """Unset what is the flavor's own, as a resolved file has it: it is no change."""
    module, flavor = (draft.settings["model", key].value for key in ("module", "flavor"))
    if module != OURS or flavor not in FLAVORS:
        return
    for key, value in dataclasses.asdict(FLAVORS[flavor].shape).items():
        if draft.settings[TABLE, key].value == value:
            draft.settings[TABLE, key] = draft.base[TABLE, key]


def check_shape(draft: Draft) -> Iterator[Problem]:
    """The changes are for a model of ours and leave it without contradictions."""
    module, flavor = draft.get("model", "module"), draft.get("model", "flavor")
    changes = changes_of(draft.table(TABLE))
    if module != OURS:
        for key in changes:
            message = f"found {quote(changes[key])}, which is for module {quote(OURS)}, not {quote(module)}"
            yield draft.problem(TABLE, key, message, 'remove it, or set it to "none"')
        return
    infinite = [key for key, value in changes.items() if isinstance(value, float) and not math.isfinite(value)]
    for key in infinite:
        yield draft.problem(TABLE, key, f"found {changes[key]}, expected a finite number")
    if infinite:
        return
    own = FLAVORS[flavor].shape
    for key, message in dataclasses.replace(own, **changes).problems():
        if key in changes:
            yield draft.problem(TABLE, key, message)
            continue
        # The flavor's value is contradicted: by the key without which it would not be.
        culprits = [name for name in changes if key not in _wrong(own, {**changes, name: getattr(own, name)})]
        culprit = (culprits or list(changes))[0]
        yield draft.problem(
            TABLE, culprit, f"found {quote(changes[culprit])}, with which the flavor's {key} is wrong: {message}"
        )


def _wrong(shape: Shape, changes: dict[str, Any]) -> set[str]:
    return {key for key, _ in dataclasses.replace(shape, **changes).problems()}
