"""A run's metrics, read from its events or its ``metrics.jsonl``. Free of torch."""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto import event_pb2
from tensorboard.util.tensor_util import make_ndarray

from nitp_titan.runs.tags import METRICS_FILE

Scalars = dict[str, list[tuple[int, float]]]
"""Tag -> its points (step, value), by rising step."""


def read_scalars(run_dir: Path) -> Scalars:
    """Every scalar that a run folder holds.

    Several event files, or several starts in one ``metrics.jsonl``, are those of a resumed run: for each tag a later
    start replaces all that an earlier one wrote from the later one's first step on, as TensorBoard shows it; where the
    events say with which step it began, those of all tags.

    Raises:
        ValueError: no such folder, or a folder with neither events nor ``metrics.jsonl``.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(_no_such_folder(run_dir))
    event_files = sorted(path for path in run_dir.glob("tb/**/events.out.tfevents.*") if path.is_file())
    metrics_file = run_dir / METRICS_FILE
    if not event_files and not metrics_file.is_file():
        raise ValueError(
            f"{run_dir}: neither TensorBoard events (tb/**/events.out.tfevents.*) nor metrics.jsonl in this folder"
            + _runs_nearby(run_dir)
        )
    scalars = _read_events(event_files)
    if not scalars and metrics_file.is_file():  # no events, or a run killed before its first one reached the disk
        scalars = _read_metrics(metrics_file)
    return scalars


def _rewind(points: list[tuple[int, float]], step: int) -> None:
    while points and points[-1][0] >= step:
        points.pop()


def _add_point(points: list[tuple[int, float]], step: int, value: float) -> None:
    """Append, after a rewind to ``step`` where the points have already reached it."""
    _rewind(points, step)
    points.append((step, value))


def _read_events(paths: Sequence[Path]) -> Scalars:
    # By the time of a file's first event: the names tell whole seconds only.
    starts: list[tuple[float, list[tuple[str | None, int, float]]]] = []
    for path in paths:
        started: float | None = None
        # Without a tag: the first step of a start, from which on nothing earlier counts.
        points: list[tuple[str | None, int, float]] = []
        # The loader ends quietly at a record that is cut off. The "legacy" one is three times as fast, since it leaves
        # the conversion of old formats to us: a scalar is a plain number or a tensor with a single element.
        for event in LegacyEventFileLoader(str(path)).Load():
            if started is None:
                started = event.wall_time
            if event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START:
                points.append((None, event.step, 0.0))
            for entry in event.summary.value:
                kind = entry.WhichOneof("value")
                if kind == "simple_value":
                    points.append((entry.tag, event.step, entry.simple_value))
                elif kind == "tensor" and entry.metadata.plugin_data.plugin_name in ("", "scalars"):
                    array = make_ndarray(entry.tensor)
                    if array.size == 1 and array.dtype.kind in "fiu":
                        points.append((entry.tag, event.step, float(array.item())))
        if started is not None:
            starts.append((started, points))
    scalars: Scalars = {}
    for _, points in sorted(starts, key=lambda start: start[0]):
        for tag, step, value in points:
            if tag is not None:
                _add_point(scalars.setdefault(tag, []), step, value)
                continue
            for earlier in scalars.values():
                _rewind(earlier, step)
    return {tag: points for tag, points in scalars.items() if points}


def _read_metrics(path: Path) -> Scalars:
    scalars: Scalars = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = record.pop("step")
            if isinstance(step, bool) or not isinstance(step, int):
                raise TypeError("step is not an integer")
        except (ValueError, TypeError, KeyError, AttributeError):
            if number < len(lines):  # the last line may be still being written, or cut off where the run was killed
                warnings.warn(f"{path}, line {number}: not a metrics record; skipped", stacklevel=3)
            continue
        for tag, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                _add_point(scalars.setdefault(tag, []), step, float(value))
    return scalars


def _is_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or (folder / "tb").is_dir()


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _no_such_folder(run_dir: Path) -> str:
    if run_dir.exists():
        return f"{run_dir}: not a run folder but a file" + _runs_nearby(run_dir)
    parent = run_dir.parent
    if not parent.is_dir():
        return f"{run_dir}: no such run folder (nor is there a folder {parent})"
    siblings = _subfolders(parent)
    siblings = [path for path in siblings if _is_run(path)] or siblings
    nearest = difflib.get_close_matches(run_dir.name, [path.name for path in siblings], n=1, cutoff=0.0)
    if not nearest:
        return f"{run_dir}: no such run folder ({parent} holds no folder)"
    return f"{run_dir}: no such run folder; the nearest there is {parent / nearest[0]}"


def _runs_nearby(folder: Path) -> str:
    """A hint for those who named the folder around their runs, or something inside a run."""
    for around in list(folder.absolute().parents)[:3]:
        if _is_run(around):
            return f"; did you mean {around}?"
    runs = [path for path in _subfolders(folder) if _is_run(path)]
    if not runs:
        return ""
    return "; runs below it: " + ", ".join(str(run) for run in runs[:5]) + (", ..." if len(runs) > 5 else "")


def run_names(run_dirs: Sequence[Path]) -> list[str]:
    """The shortest names that tell the (different) folders apart: as many last parts of each path as that takes.

    A tail that all of them share is left out: ``lr_1/run`` and ``lr_2/run`` are ``lr_1`` and ``lr_2``.
    """
    parts = [Path(os.path.abspath(run_dir)).parts[1:] or ("/",) for run_dir in run_dirs]
    if len(parts) > 1:
        while len({path[-1] for path in parts}) == 1 and min(len(path) for path in parts) > 1:
            parts = [path[:-1] for path in parts]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]))
    return names
