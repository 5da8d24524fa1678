"""The form that every shim has, so that each says what it changes, why, and when it can go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shim:
    """One change to a library at run time."""

    target: str
    """The attribute that is set."""

    reason: str
    """What fails without it."""

    until: str
    """The version that ends it."""

    applies: Callable[[], bool]
    """Whether this machine needs it."""

    apply: Callable[[], None]
