"""``[model.shape]`` against the flavor that it changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote
from nitp_titan.job.model_facts import OURS
from nitp_titan.job.shape import TABLE, changes_of
from nitp_titan.models.flavors import FLAVORS, Shape


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
