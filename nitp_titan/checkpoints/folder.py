"""A run's folder of checkpoints: how one is put in its place, what a crash leaves, which ones are kept. Free of torch.

``step-N`` is a checkpoint. While one is written it is ``.saving-N``; one that is replaced is ``.replaced-N`` for a
moment, and one that is deleted ``.deleting-N``: whatever is killed in between, a ``step-N`` is whole. A run that goes
back to an earlier step renames the later ones to ``abandoned-N``. No other name is looked at or touched.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from nitp_titan.runs.manifest import Manifest, ManifestError, sync_folder
from nitp_titan.runs.steps import MARKS, complete_steps, is_complete, steps_in

WENT_BACK = ".went-back-to"
"""File that holds the step that a run has gone back to."""


def saving(final: Path) -> Path:
    """Return where a checkpoint is written that is to be ``step-N``."""
    return final.with_name(f".saving-{_step_of(final)}")


def put_in_place(unfinished: Path, final: Path) -> None:
    """Make a written checkpoint the ``step-N`` that it is of; one that is there is removed when the new one is.

    Raises:
        OSError: it cannot be renamed.
    """
    replaced = final.with_name(f".replaced-{_step_of(final)}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    unfinished.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clean_up(folder: Path) -> list[str]:
    """Finish or remove what a run that was killed has left in its folder; return a line for each.

    Raises:
        OSError: something cannot be renamed or removed.
    """
    lines = []
    names = (path.name for path in folder.glob(".*-*") if path.is_dir())
    matches = [m for name in names if (m := re.fullmatch(r"\.(saving|replaced|deleting)-(0|[1-9][0-9]*)", name))]
    # What was written last comes first: it replaces what was there before.
    for match in sorted(matches, key=lambda match: (match[1] != "saving", match[0])):
        left, final = folder / match[0], folder / f"step-{match[2]}"
        if match[1] == "saving" and not is_complete(final, MARKS) and _sealed(left):
            shutil.rmtree(final, ignore_errors=True)
            left.rename(final)
            lines.append(f"{final} had been saved whole, and is put in its place")
        elif match[1] == "replaced" and not final.exists() and is_complete(left, MARKS):
            left.rename(final)
            lines.append(f"{final} is put back: what was to replace it was not finished")
        else:
            shutil.rmtree(left)
            what = "an interrupted save" if match[1] == "saving" else "an interrupted removal"
            lines.append(f"{left}: what {what} had left is removed")
    return lines


def to_remove(folder: Path, *, keep_latest: int, keep_every: int, protected: Collection[int]) -> list[int]:
    """Return the steps that are no longer kept: all complete ones but the latest so many.

    Args:
        keep_latest: complete checkpoints that are left, at the least; 0 = all.
        keep_every: multiples of it are kept for good, and are not counted; 0 = none.
        protected: steps that are kept in any case.
    """
    if not keep_latest:
        return []
    # What is kept for good is not looked into, since this is done at every save, and there may be many.
    others = [step for step in steps_in(folder) if not (keep_every and step and step % keep_every == 0)]
    counted = [step for step in others if is_complete(folder / f"step-{step}", MARKS)]
    return [step for step in counted[:-keep_latest] if step not in protected]


def take_away(folder: Path, step: int) -> Path:
    """Rename a checkpoint that is to be removed, so that none is ever half there; return where it is.

    Raises:
        OSError: it cannot be renamed.
    """
    left = folder / f".deleting-{step}"
    shutil.rmtree(left, ignore_errors=True)
    (folder / f"step-{step}").rename(left)
    return left


def set_aside(folder: Path, after: int, *, noted: bool = False) -> list[Path]:
    """Rename the checkpoints of later steps than one that a run goes back to; return where they are.

    Args:
        noted: whether it is noted, so that the same command goes on from what it saves after that.

    Raises:
        OSError: one cannot be renamed.
    """
    if noted:
        (folder / WENT_BACK).write_text(f"{after}\n", encoding="utf-8")
    found = []
    for step in steps_in(folder):
        if step <= after:
            continue
        place, times = folder / f"abandoned-{step}", 1
        while place.exists():
            times += 1
            place = folder / f"abandoned-{step}.{times}"
        (folder / f"step-{step}").rename(place)
        found.append(place)
    return found


def went_back_already(folder: Path, step: int) -> bool:
    """Whether an earlier start has gone back to a step (``checkpoint.load_step``), and saved a later one since."""
    try:
        noted = int((folder / WENT_BACK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return noted == step and any(later > step for later in complete_steps(folder, MARKS))


def _sealed(folder: Path) -> bool:
    try:
        manifest = Manifest.read(folder)
    except ManifestError:
        return False
    return manifest is not None and not manifest.wrong_sizes(folder)


def _step_of(final: Path) -> str:
    return final.name.removeprefix("step-")
