"""Which checkpoint a run goes on from: the latest that is whole, and why each later one is not; on all ranks alike."""

from __future__ import annotations

from pathlib import Path

from torch import distributed as dist
from torchtitan.tools.logging import logger

from nitp_titan.checkpoints.fit import a_few
from nitp_titan.checkpoints.ranks import is_first_rank, of_every_rank, of_first_rank
from nitp_titan.checkpoints.reader import CheckpointUnreadable, SafeReader, damaged_items, ends_of_files
from nitp_titan.runs.manifest import LATER_VERSION, Holds, Manifest, ManifestError
from nitp_titan.runs.metadata import too_short
from nitp_titan.runs.steps import MARKS, METADATA, complete_steps, incomplete, steps_in


class NoWholeCheckpoint(ValueError):
    """A run has checkpoints, and none of them can be trusted; the message has a line for each."""


def latest_whole(folder: Path, *, checksums: bool) -> int | None:
    """Return the step of the latest checkpoint that is whole; None where a run has none at all.

    Each later one is named in the log with the reason why it is passed over.

    Args:
        folder: of the run's checkpoints.
        checksums: whether files are read against their checksums, a part of them on each rank.

    Raises:
        NoWholeCheckpoint: there are checkpoints that were complete once, and none that is whole.
    """
    passed_over = []
    for step in reversed(of_first_rank(steps_in(folder))):
        place = folder / f"step-{step}"
        reason = reason_against(place, checksums=checksums)
        if not reason and not (step == 0 and passed_over):
            return step
        if not reason:
            break  # a seed: to start from it would be to start anew
        if LATER_VERSION in reason:
            raise NoWholeCheckpoint(f"{place}: {reason}")
        logger.warning(f"{place} is passed over: {reason}")
        # What was killed while TorchTitan saved it never was a checkpoint.
        if of_first_rank(any((place / mark).exists() for mark in MARKS)):
            passed_over.append(f"{place}: {reason}")
    if passed_over:
        raise NoWholeCheckpoint("\n".join(passed_over))
    return None


def reason_against(place: Path, *, checksums: bool) -> str:
    """Return why a checkpoint cannot be trusted, found by all ranks together and the same on each; else empty."""
    reason = of_first_rank(_reason_by_size(place) if is_first_rank() else "")
    if reason or not checksums:
        return reason
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wrong = of_every_rank(_damage(place, rank, ranks))
    return a_few([line for of_rank in wrong for line in of_rank])


def what_is_held(folder: Path, step: int) -> tuple[Holds, int]:
    """Return what a step's checkpoint holds, and the latest step of which everything is held; -1 for none."""
    held = {other: Manifest.read(folder / f"step-{other}") for other in complete_steps(folder, MARKS)}
    full = [other for other, manifest in held.items() if manifest and manifest.holds == "everything"]
    own = held.get(step)
    return own.holds if own else "everything", max(full, default=-1)


def _reason_by_size(place: Path) -> str:
    if not place.is_dir():
        return "there is no such folder"
    if reason := incomplete(place, MARKS):
        return reason
    if not (place / METADATA).is_file():
        return ""  # in Hugging Face's format
    try:
        # Before anything is made of them: what a flipped bit makes of metadata is still metadata now and then.
        manifest = Manifest.read(place)
        if manifest is not None and (wrong := manifest.wrong_checksums(place, [METADATA])):
            return wrong[0]
        return a_few(too_short(place, ends_of_files(SafeReader(place).read_metadata())))
    except (CheckpointUnreadable, ManifestError) as error:
        return str(error)
    except Exception as error:  # ranks wait for what this one has found
        return f"its {METADATA} cannot be read ({type(error).__name__})"


def _damage(place: Path, rank: int, ranks: int) -> list[str]:
    """Return what is damaged in this rank's part of the files."""
    try:
        manifest = Manifest.read(place)
    except ManifestError as error:
        return [str(error)]
    if manifest is not None:
        return manifest.wrong_checksums(place, list(manifest.files)[rank::ranks])
    if not (place / METADATA).is_file():
        return []
    try:
        return damaged_items(place, SafeReader(place).read_metadata(), lambda number: number % ranks == rank)
    except CheckpointUnreadable as error:
        return [str(error)]
    except Exception as error:  # ranks wait for what this one has found
        return [f"its {METADATA} cannot be read ({type(error).__name__})"]
