"""In what state a run's folder is: its checkpoints, from which one it would go on, what a job would change.

Free of torch, so that it answers at once.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import tomli

from nitp_titan.checkpoints.fingerprint import differences, refusals
from nitp_titan.job.fingerprint import fingerprint
from nitp_titan.job.job import Job
from nitp_titan.runs.manifest import WEIGHTS_ALONE, Manifest, ManifestError
from nitp_titan.runs.metadata import named_in, too_short
from nitp_titan.runs.origin import branched_from
from nitp_titan.runs.status import is_alive, read_status
from nitp_titan.runs.steps import MARKS, METADATA, incomplete, steps_in

_OURS = re.compile(r"\.(saving|replaced|deleting)-\d+|abandoned-\d+(\.\d+)?")


class NoRun(ValueError):
    """There is no such run; the message says what was found."""


def examine(run: Path, job: Job | None = None, *, checksums: bool = False) -> dict[str, Any]:
    """Return the state of a run.

    Args:
        run: its folder (``job.dump_folder``).
        job: what would go on in it.
        checksums: whether the files are read whole; otherwise names, sizes and manifests are looked at.

    Returns:
        ``run``, ``folder`` of the checkpoints; ``status``, what the run says of itself (None where it does not), with
        ``alive``: whether its process lives; ``branched_from``, another run's checkpoint, or ""; ``checksums``, whether
        they were read; ``checkpoints``, the latest first, each with ``step``, ``holds`` (None where that is unknown),
        ``saved``, ``bytes`` and ``problem`` ("" for a whole one); ``resumes_from``, a step or None; ``can_resume``;
        ``why_not``, lines; ``changes``, what the job would change, lines; ``left``, what an interrupted save or a
        rollback has left.

    Raises:
        NoRun: there is no such folder, or it is no run's.
    """
    folder = _checkpoints(run, job)
    found = [_checkpoint(folder, step, checksums) for step in reversed(steps_in(folder))]
    whole = [one for one in found if not one["problem"]]
    why_not, changes = [], []
    step = job["checkpoint"]["load_step"] if job is not None else -1
    if step >= 0:
        whole = [one for one in whole if one["step"] == step]
    latest = whole[0] if whole else None
    if job is not None and not job["checkpoint"]["enable"]:
        why_not.append("checkpoint.enable is false: the job would start anew")
    elif latest is None and step >= 0:
        why_not.append(f"checkpoint.load_step is {step}, of which there is no whole checkpoint")
    elif latest is None:
        why_not.append(f"{folder} has no whole checkpoint" if found else f"{folder} has no checkpoint")
    elif latest["holds"] != "everything" and latest["step"] > 0:
        why_not.append(f"step-{latest['step']} {WEIGHTS_ALONE}")
    elif job is not None:
        refused, changes = _changes(folder / f"step-{latest['step']}", job)
        why_not += [f"step-{latest['step']} {sentence}" for sentence in refused]
    return {
        "run": str(run),
        "folder": str(folder),
        "status": _status(run),
        "branched_from": branched_from(run),
        "checksums": checksums,
        "checkpoints": found,
        "resumes_from": latest["step"] if latest is not None and not why_not else None,
        "can_resume": not why_not,
        "why_not": why_not,
        "changes": changes,
        "left": sorted(path.name for path in folder.glob("*") if _OURS.fullmatch(path.name)),
    }


def render(state: dict[str, Any]) -> str:
    """Return a state as lines for people."""
    lines = [f"run        {state['run']}"]
    if state["branched_from"]:
        lines.append(f"branched   from {state['branched_from']}")
    if state["status"]:
        lines.append(f"status     {_said(state['status'])}")
    for one in state["checkpoints"]:
        size = f"{one['bytes'] / 1e9:,.2f} GB"
        about = ", ".join(filter(None, (one["holds"] or "no manifest: an older version's", size, one["saved"])))
        lines.append(f"step-{one['step']:<6}{'damaged: ' + one['problem'] if one['problem'] else 'whole: ' + about}")
    if state["left"]:
        lines.append(f"left       {', '.join(state['left'])}")
    lines += [f"would change: {line}" for line in state["changes"]]
    lines += [f"cannot go on: {line}" for line in state["why_not"]]
    if state["can_resume"]:
        read = "" if state["checksums"] else "; the run reads the checksums as well, as --checksums does"
        lines.append(f"goes on from step-{state['resumes_from']}{read}")
    return "\n".join(lines)


def _status(run: Path) -> dict[str, Any] | None:
    status = read_status(run)
    return None if status is None else {**dataclasses.asdict(status), "alive": is_alive(run, status)}


def _said(status: dict[str, Any]) -> str:
    """Return a status in words."""
    state = status["state"]
    if state == "running" and not status["alive"]:
        state = "killed: it says that it is running, and its process is dead"
    reason = f": {status['reason']}" if status["reason"] else ""
    return f"{state} at step {status['step']:,} of {status['steps']:,}, {status['time']}{reason}"


def _checkpoints(run: Path, job: Job | None) -> Path:
    if not run.is_dir():
        raise NoRun(f"{run}: found {'a file' if run.exists() else 'nothing'}, expected the folder of a run")
    name = "checkpoint"
    if job is not None:
        return run / job["checkpoint"]["folder"]
    try:
        name = tomli.loads((run / "config.toml").read_text(encoding="utf-8"))["checkpoint"]["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        if not (run / name).is_dir():
            raise NoRun(f"{run}: found no config.toml and no folder {name}, expected the folder of a run") from None
    return run / name


def _checkpoint(folder: Path, step: int, checksums: bool) -> dict[str, Any]:
    place = folder / f"step-{step}"
    problem, manifest = incomplete(place, MARKS), None
    try:
        manifest = Manifest.read(place)
    except ManifestError as error:
        problem = problem or str(error)
    if checksums and manifest is not None and not problem:
        problem = "; ".join(manifest.wrong_checksums(place, manifest.files)[:3])
    holds = manifest.holds if manifest else None
    if manifest is None and not problem:
        holds, problem = _without_manifest(place)
    files = [path for path in place.rglob("*") if path.is_file()]
    return {
        "step": step,
        "holds": holds,
        "saved": manifest.saved if manifest else "",
        "bytes": sum(path.stat().st_size for path in files),
        "problem": problem,
    }


def _without_manifest(place: Path) -> tuple[str | None, str]:
    """Return what a checkpoint of an older version, or of TorchTitan, holds, and what is wrong with it."""
    if not (place / METADATA).is_file():
        return "hugging face", ""
    try:
        names, files = named_in(place / METADATA)
    except ValueError as error:
        return None, str(error)
    if wrong := too_short(place, files):
        return None, wrong[0]
    return "everything" if any(name.startswith("optimizer.") for name in names) else "weights", ""


def _changes(place: Path, job: Job) -> tuple[list[str], list[str]]:
    """Return for what a run would be refused, and what would be said."""
    manifest = Manifest.read(place)
    if manifest is None or not manifest.fingerprint:
        return [], []
    found = differences(manifest.fingerprint, fingerprint(job))
    table = job["checkpoint"]
    allowed = {*table["allow_changes"], *(("data",) if "dataloader" in table["exclude_from_loading"] else ())}
    refused = refusals(found, allowed)
    return refused, [str(one) for one in found if not one.refused or one.group in allowed]
