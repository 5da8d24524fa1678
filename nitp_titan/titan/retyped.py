"""TorchTitan's configurations, each of which belongs to the class that it builds."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

C = TypeVar("C")


def retyped(config: Any, cls: type[C], **changes: Any) -> C:
    """Return a configuration as another class's, with changes; ``config`` is left as it was, its values are shared.

    Args:
        config: a dataclass.
        cls: one that has all fields of ``config``, as those that derive from it have.
        changes: values of other fields, or other values.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return cls(**{**values, **changes})
