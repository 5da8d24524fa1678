"""The resolved job file: every table and key of a run, with the values that were chosen, as TOML that reproduces it."""

from __future__ import annotations

import importlib.metadata
import shlex
from pathlib import Path
from typing import Any

import tomli_w

import nitp_titan
from nitp_titan.job.checks.schedule import Schedule
from nitp_titan.job.job import Job
from nitp_titan.job.loss_name import loss_name
from nitp_titan.job.shape import TABLE as SHAPE


def write_resolved(job: Job, path: str | Path) -> None:
    """Write ``job`` to ``path``; its folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(resolved_toml(job), encoding="utf-8")


def resolved_toml(job: Job) -> str:
    """Return ``job`` as TOML. Loading it gives the same values; a comment tells where each came from."""
    versions = [f"nitp_titan {nitp_titan.__version__}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in ("torchtitan", "torch")]
    overrides = shlex.join(job.overrides).replace("\n", " ").replace("\r", " ")
    lines = [
        "# The resolved configuration of a run: every key, with its source where that is not TorchTitan's default.",
        f"# {', '.join(versions)}; {job.world_size} rank(s)",
        f"# from {_one_line(job.file)}" + (f" with {_one_line(overrides)}" if overrides else ""),
    ]
    stands_for = meanings(job)
    for table, values in job.tables.items():
        lines += ["", f"[{table}]"]
        for key, value in values.items():
            source = job.sources[table][key]
            if table == SHAPE and value is None and job.shape is not None:
                value, source = getattr(job.shape, key), "flavor"
            remarks = [source] if source != "upstream" else []
            remarks += [stands_for[table, key]] if (table, key) in stands_for else []
            lines.append(_entry(key, value) + (f"  # {': '.join(remarks)}" if remarks else ""))
    return "\n".join(lines) + "\n"


def meanings(job: Job) -> dict[tuple[str, str], str]:
    """Return what (table, key) stands for in this job where its value is "unset", "auto", "as many as are left"."""
    loss, schedule, profiler = job["loss"], job["lr_scheduler"], job["profiler"]
    found = {}
    if schedule["total_steps"] is None:
        found["lr_scheduler", "total_steps"] = f"training.steps, {job['training']['steps']}"
    if schedule["decay_ratio"] is None:
        decay = Schedule.of(lambda table, key: job[table][key]).decay
        found["lr_scheduler", "decay_ratio"] = f"all steps after the warm-up, {decay}"
    if loss["name"] == "auto":
        found["loss", "name"] = loss_name("auto", job["nitp"]["enable"])
    if job["parallelism"]["data_parallel_shard_degree"] == -1:
        found["parallelism", "data_parallel_shard_degree"] = f"all ranks that are left, {job.layout.shard}"
    if profiler["memory_snapshot_freq"] is None:
        found["profiler", "memory_snapshot_freq"] = f"profiler.profile_freq, {profiler['profile_freq']}"
    return found


def _entry(key: str, value: Any) -> str:
    """Return ``key = value``; None, which TOML does not have, is "none"."""
    text = tomli_w.dumps({key: "none" if value is None else _plain(value)}, indent=0).rstrip("\n")
    # Newlines in strings are escaped by tomli_w: what is left are those of arrays.
    return text.replace("[\n", "[").replace(",\n]", "]").replace(",\n", ", ")


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _one_line(text: str) -> str:
    # A TOML comment admits no control characters.
    return "".join(char if char.isprintable() else "?" for char in text)
