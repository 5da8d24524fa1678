"""The files that a distributed checkpoint's ``.metadata`` names, read without torch and without running anything."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class _Anything:
    """In the place of every class that metadata are made of."""

    def __init__(self, *arguments: Any, **_: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Anything


def named_in(metadata: Path) -> tuple[set[str], dict[str, int]]:
    """Return the names of what a checkpoint holds, and its files with the bytes that each has at the least.

    Raises:
        ValueError: they cannot be read, or are something else.
    """
    try:
        with metadata.open("rb") as file:
            found = _Unpickler(file).load().state
        stored = [place.state for place in found["storage_data"].values()]
        files = ends((place["relative_path"], place["offset"] + place["length"]) for place in stored)
        return set(found["state_dict_metadata"]), files
    except Exception as error:  # of a damaged pickle anything can come
        raise ValueError(f"its {metadata.name} cannot be read ({type(error).__name__})") from None


def ends(places: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the largest end of each file's items."""
    found: dict[str, int] = defaultdict(int)
    for name, end in places:
        found[name] = max(found[name], end)
    return dict(found)


def too_short(folder: Path, ends: Mapping[str, int]) -> list[str]:
    """Return what is wrong with the files of a checkpoint without a manifest, as far as their sizes tell."""
    found = []
    for name, end in sorted(ends.items()):
        try:
            size = (folder / name).stat().st_size
        except OSError:
            found.append(f"{name} is missing")
            continue
        if size < end:
            found.append(f"{name} has {size:,} bytes, of at least {end:,}")
    return found
