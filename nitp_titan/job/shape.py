"""``[model.shape]``: what a job changes in the shape of a flavor of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nitp_titan.job.draft import Draft
from nitp_titan.job.model_facts import OURS
from nitp_titan.models.flavors import FLAVORS, Shape

TABLE = "model.shape"


def changes_of(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the table that are set."""
    return {key: value for key, value in table.items() if value is not None}


def shape_of(module: str, flavor: str, table: Mapping[str, Any]) -> Shape | None:
    """Return the flavor's shape with the table's changes; None for a model that is not ours."""
    return dataclasses.replace(FLAVORS[flavor].shape, **changes_of(table)) if module == OURS else None


def shape_of_draft(draft: Draft) -> Shape | None:
    """Return the shape of a draft's model; None for one that is not ours.

    Raises:
        Unknown: a value that it depends on is wrong.
    """
    return shape_of(draft.get("model", "module"), draft.get("model", "flavor"), draft.table(TABLE))


def drop_unchanged(draft: Draft) -> None:
    """Unset what is the flavor's own, as a resolved file has it: it is no change."""
    module, flavor = (draft.settings["model", key].value for key in ("module", "flavor"))
    if module != OURS or flavor not in FLAVORS:
        return
    for key, value in dataclasses.asdict(FLAVORS[flavor].shape).items():
        if draft.settings[TABLE, key].value == value:
            draft.settings[TABLE, key] = draft.base[TABLE, key]
