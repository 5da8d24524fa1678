"""Which steps of a run's checkpoint folder are complete. Free of torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from nitp_titan.runs.manifest import NAME, Manifest, ManifestError

METADATA = ".metadata"
"""What a distributed checkpoint has; TorchTitan writes it last."""

HF_INDEX = "model.safetensors.index.json"
"""What a checkpoint that TorchTitan saved for Hugging Face has."""

MARKS = (METADATA, HF_INDEX, NAME)
"""What a checkpoint of any kind has one of; TorchTitan knows one that it would load by the first two."""


def steps_in(folder: Path) -> list[int]:
    """Return the steps of which a folder has a ``step-N``, complete or not, ascending; none where it cannot be read.

    Only names that are exactly so are a run's: ``best-step-7`` and ``step-7.bak`` are somebody's own.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    # As TorchTitan writes them; it does not find a step with zeros before its number.
    found = [int(match[1]) for name in names if (match := re.fullmatch(r"step-(0|[1-9][0-9]*)", name))]
    return sorted(step for step in found if (folder / f"step-{step}").is_dir())


def incomplete(folder: Path, marks: Iterable[str] = (METADATA,)) -> str:
    """Return why a folder is no complete checkpoint, as far as names and sizes tell; empty where it is one.

    Args:
        marks: the files one of which tells that a checkpoint without a manifest is complete.
    """
    if not any((folder / name).is_file() for name in marks):
        return f"it is incomplete: it has no {' or '.join(marks)}, which is written last"
    try:
        manifest = Manifest.read(folder)
    except ManifestError as error:
        return str(error)
    return "; ".join(manifest.wrong_sizes(folder)[:3]) if manifest else ""


def is_complete(folder: Path, marks: Iterable[str] = (METADATA,)) -> bool:
    """Whether a folder is a complete checkpoint, as far as names and sizes tell."""
    return not incomplete(folder, marks)


def complete_steps(folder: Path, marks: Iterable[str] = (METADATA,)) -> list[int]:
    """Return the steps of which a folder has a complete checkpoint, ascending; none where it cannot be read."""
    return [step for step in steps_in(folder) if is_complete(folder / f"step-{step}", marks)]
