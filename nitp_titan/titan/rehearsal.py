"""The first step of a pipeline: torch rehearses it, and what the rehearsal leaves is undone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def isolate_rehearsal(schedule: Any, undone: Callable[[], AbstractContextManager]) -> None:
    """Make a pipeline schedule find the shapes that its stages exchange inside ``undone()``.

    torch's schedules find them by a forward and backward pass of the first micro-batch, before the first step and
    whenever training and evaluation alternate. Whoever counts in the forward pass (expert loads) or in the loss would
    count that micro-batch twice.
    """
    rehearse = schedule._initialize_pp_stages

    def isolated(
        stages: Any, args: Any, kwargs: Any, target: Any, forward_known: bool, backward_known: bool, **options: Any
    ) -> Any:
        call = stages, args, kwargs, target, forward_known, backward_known
        if forward_known and backward_known == schedule._has_backward:
            return rehearse(*call, **options)
        with undone():
            return rehearse(*call, **options)

    schedule._initialize_pp_stages = isolated
