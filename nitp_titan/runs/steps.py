"""Which steps of a run's checkpoint folder are complete. Free of torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

METADATA = ".metadata"
"""What a distributed checkpoint has; it is written last."""

HF_INDEX = "model.safetensors.index.json"
"""What a checkpoint that TorchTitan saved for Hugging Face has."""


def is_complete(folder: Path, marks: Iterable[str] = (METADATA,)) -> bool:
    """Whether a checkpoint has one of the files that tell so."""
    return any((folder / name).is_file() for name in marks)


def complete_steps(folder: Path, marks: Iterable[str] = (METADATA,)) -> list[int]:
    """Return the steps of which a folder has a complete checkpoint, ascending; none where it cannot be read."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    # As TorchTitan writes them; it does not find a step with zeros before its number.
    steps = [int(found[1]) for name in names if (found := re.fullmatch(r"step-(0|[1-9][0-9]*)", name))]
    return sorted(step for step in steps if is_complete(folder / f"step-{step}", marks))
