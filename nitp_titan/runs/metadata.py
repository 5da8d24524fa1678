"""The files that a distributed checkpoint's ``.metadata`` names, read without torch and without running anything."""

from __future__ import annotations

import pickle
from collections import defaultdict
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
        ends: dict[str, int] = defaultdict(int)
        for place in found["storage_data"].values():
            stored = place.state
            name, end = stored["relative_path"], stored["offset"] + stored["length"]
            ends[name] = max(ends[name], end)
        return set(found["state_dict_metadata"]), dict(ends)
    except Exception as error:  # of a damaged pickle anything can come
        raise ValueError(f"its {metadata.name} cannot be read ({type(error).__name__})") from None
