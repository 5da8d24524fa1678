"""Versions of packages, compared as (major, minor)."""

from __future__ import annotations

import re


def release(version: str) -> tuple[int, int]:
    """Return (major, minor) of a version such as "2.13.0+cpu" or "2.15.0.dev20260801"; (0, 0) if it is none."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
