"""Where a run's first weights come from: checkpoints and Hugging Face folders that a job names, against the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote
from nitp_titan.runs.steps import MARKS, complete_steps, incomplete, is_complete

_NEEDS_ENABLE = {
    "branch_from": "the run would start from random weights",
    "initial_load_path": "the run would start from random weights",
    "initial_load_in_hf": "the run would start from random weights",
    "load_step": "the run would start from random weights",
    "create_seed_checkpoint": "nothing would be saved",
}


def check_enabled(draft: Draft) -> Iterator[Problem]:
    """What a run is to start from is loaded with checkpoints alone."""
    if draft.get("checkpoint", "enable"):
        return
    for key, otherwise in _NEEDS_ENABLE.items():
        value = draft.get("checkpoint", key)
        if value is None or value is False or value in ("", -1):
            continue
        hint = "load_only = true beside it saves none" if key != "create_seed_checkpoint" else ""
        message = f"found {quote(value)}, which needs checkpoint.enable = true: {otherwise}"
        yield draft.problem("checkpoint", key, message, hint)


def check_files(draft: Draft) -> Iterator[Problem]:
    """The checkpoint that a run is to start from is there; it may be still to be made when a job is checked."""
    if not draft.get("checkpoint", "enable"):
        return
    folder = Path(draft.get("job", "dump_folder"), draft.get("checkpoint", "folder"))
    step = draft.get("checkpoint", "load_step")
    if step >= 0:
        place = folder / f"step-{step}"
        if reason := incomplete(place, MARKS):
            latest = latest_step(folder)
            hint = f"the latest there is {latest}" if latest is not None else "there is none"
            found = f"found {step}, which {folder} has no checkpoint of"
            found += f": {reason}" if place.is_dir() else ""
            yield draft.problem("checkpoint", "load_step", found, hint)
    elif latest_step(folder) is None:
        # A run that has a checkpoint of its own goes on from that.
        yield from _check_branch(draft) if draft.get("checkpoint", "branch_from") else _check_start(draft)


def check_branch(draft: Draft) -> Iterator[Problem]:
    """A branch starts from one checkpoint, in full, of another run."""
    path = draft.get("checkpoint", "branch_from")
    if not path:
        return
    for key in ("initial_load_path", "initial_load_in_hf", "create_seed_checkpoint"):
        if value := draft.get("checkpoint", key):
            message = f"found {quote(path)} beside {key} = {quote(value)}, expected one of the two"
            yield draft.problem("checkpoint", "branch_from", message)
    own = Path(draft.get("job", "dump_folder"), draft.get("checkpoint", "folder")).absolute()
    if "://" not in path and (own in branch_checkpoint(path).parents or own == branch_checkpoint(path)):
        hint = "checkpoint.load_step goes back to an earlier step of the run itself"
        found = f"found {quote(path)}, which is of this run's own folder, expected another run's"
        yield draft.problem("checkpoint", "branch_from", found, hint)


def branch_checkpoint(path: str) -> Path:
    """Return the checkpoint that a path of ``checkpoint.branch_from`` means: ``RUN/step-N`` is short."""
    place = Path(path).absolute()
    inside = place.parent / "checkpoint" / place.name
    return inside if inside.is_dir() and not place.is_dir() else place


def _check_branch(draft: Draft) -> Iterator[Problem]:
    path = draft.get("checkpoint", "branch_from")
    if "://" in path:
        return
    place = branch_checkpoint(path)
    if reason := incomplete(place) if place.is_dir() else "there is no such folder":
        hint = ""
        for inside in (place, place / "checkpoint", place.parent, place.parent / "checkpoint"):
            if (latest := latest_step(inside)) is not None:
                hint = f'did you mean "{inside / f"step-{latest}"}"?'
                break
        found = f"found {quote(path)}, which is no checkpoint to go on from: {reason}"
        yield draft.problem("checkpoint", "branch_from", found, hint)


def notes(draft: Draft) -> Iterator[str]:
    """Yield a line where first weights are named and a run goes on from a checkpoint of its own, as a restart does."""
    folder = Path(draft.get("job", "dump_folder"), draft.get("checkpoint", "folder"))
    latest = latest_step(folder) if draft.get("checkpoint", "enable") else None
    for key in ("branch_from", "initial_load_path", "initial_load_in_hf"):
        if latest is not None and draft.get("checkpoint", key):
            yield f"checkpoint.{key} is not read: the run goes on from its own {folder / f'step-{latest}'}"


def _check_start(draft: Draft) -> Iterator[Problem]:
    path, in_hf = (
        (draft.get("checkpoint", "initial_load_path") or "").strip(),
        draft.get("checkpoint", "initial_load_in_hf"),
    )
    key, table = "initial_load_path", "checkpoint"
    if not path and in_hf:
        path, key, table = draft.get("model", "hf_assets_path"), "hf_assets_path", "model"
        if not path:
            message = "found true, which needs an initial_load_path or a model.hf_assets_path"
            yield draft.problem("checkpoint", "initial_load_in_hf", message)
    if not path or "://" in path:
        return
    place = Path(path)
    found = f"found {quote(path)}"
    if not place.is_dir():
        hint = 'write the path out: "~" is not expanded' if path.startswith("~") else ""
        missing = "which is a file" if place.is_file() else "which does not exist"
        yield draft.problem(table, key, f"{found}, {missing}, expected the folder of a checkpoint", hint)
        return
    safetensors = any(place.glob("*.safetensors"))
    if in_hf and not safetensors:
        other = next((file.name for file in place.glob("*.bin")), "")
        hint = f"convert {other} to safetensors" if other else ""
        yield draft.problem(table, key, f"{found}, which has no .safetensors file", hint)
    if in_hf or is_complete(place):
        return
    hint = "set initial_load_in_hf = true for Hugging Face's safetensors" if safetensors else ""
    for inside in (place, place / "checkpoint"):
        if (latest := latest_step(inside)) is not None:
            hint = f'did you mean "{inside / f"step-{latest}"}"?'
    yield draft.problem(table, key, f"{found}, which is no complete checkpoint: it has no .metadata", hint)


def latest_step(folder: Path) -> int | None:
    """Return the latest step of which a folder has a complete checkpoint; None where it has none."""
    return max(complete_steps(folder, MARKS), default=None)
