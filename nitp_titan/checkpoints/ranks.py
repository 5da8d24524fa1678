"""What all ranks of a run come to alike, where each alone could see something else."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed as dist

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this rank is the one that decides."""
    return not dist.is_initialized() or dist.get_rank() == 0


def of_every_rank(value: T) -> list[T]:
    """Return the value of each rank, in their order; of this process alone where there is one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def of_first_rank(value: T) -> T:
    """Return what the first rank has: what a folder holds may look otherwise elsewhere a moment later."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def failure_of_first_rank(work: Callable[[], Any]) -> Exception | None:
    """Have the first rank do something that the others wait for; return what it raised, on all ranks alike."""
    error: Exception | None = None
    if is_first_rank():
        try:
            work()
        except Exception as caught:
            error = caught if _travels(caught) else RuntimeError(f"{type(caught).__name__}: {caught}")
    return of_first_rank(error)


def _travels(error: Exception) -> bool:
    """Whether an exception comes to other ranks as it is; what cannot be sent would leave them waiting."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True
