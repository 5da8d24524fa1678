"""What a run is, for its checkpoints: a job's values in groups that a resumed run is compared by. Free of torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

from nitp_titan import __version__
from nitp_titan.job.job import Job, Table
from nitp_titan.runs.manifest import Entry

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt")
_BATCH = ("global_batch_size",)
_PRECISION = ("dtype", "mixed_precision_param", "mixed_precision_reduce")
_DATA = ("dataset", "dataset_path", "text_field", "split", "streaming", "infinite", "on_bad_text")
_OPTIMIZER = ("lr", "beta1", "beta2", "eps", "weight_decay")


def fingerprint(job: Job) -> dict[str, dict[str, Any]]:
    """Return group -> key (``table.key`` of a job) -> value, all of them JSON's.

    What has no say in what is computed is left out: logging, prefetching, how often a checkpoint is saved.
    """
    nitp = job["nitp"] if job["nitp"]["enable"] else {"enable": False}
    without = ("geometry_freq",)  # a measurement
    return {
        "model": _model(job),
        "tokenizer": _tokenizer(job),
        "data": _data(job),
        "optimizer": {"optimizer.name": job["optimizer"]["name"]},
        "nitp": _named("nitp", nitp, [key for key in nitp if key not in without]),
        "schedule": {
            "training.steps": job["training"]["steps"],
            **_named("optimizer", job["optimizer"], _OPTIMIZER),
            **_named("lr_scheduler", job["lr_scheduler"], job["lr_scheduler"]),
        },
        "batch": _named("training", job["training"], _BATCH),
        "precision": {
            **_named("training", job["training"], _PRECISION),
            "float8.recipe": job["float8"]["recipe"],
        },
        "layout": {
            "ranks": job.world_size,
            **{f"parallelism.{key}": value for key, value in job["parallelism"].items() if key.endswith("_degree")},
        },
        "versions": _versions(),
        "origin": {
            "commit": _commit(),
            "checkpoint.branch_from": job["checkpoint"]["branch_from"],
            "checkpoint.initial_load_path": job["checkpoint"]["initial_load_path"],
        },
    }


def _named(table: str, values: Table, keys: Any) -> dict[str, Any]:
    return {f"{table}.{key}": _json(values[key]) for key in keys}


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _model(job: Job) -> dict[str, Any]:
    found = _named("model", job["model"], ("module", "flavor"))
    if job.shape is not None:
        # A flavor by another name with the same shape is the same model.
        found.pop("model.flavor")
        found |= {f"model.shape.{key}": _json(value) for key, value in dataclasses.asdict(job.shape).items()}
    return found


def _data(job: Job) -> dict[str, Any]:
    table = job["dataloader"]
    found = _named("dataloader", table, _DATA)
    path = table["dataset_path"]
    found["dataloader.dataset_path"] = path if path is None or "://" in path else os.path.abspath(path)
    # What is not read where another key says so does not tell one run from another.
    if table["infinite"]:
        found |= _named("dataloader", table, ("seed", "num_streams"))
    if table["streaming"]:
        found |= _named("dataloader", table, ("shuffle_buffer",))
    # A sequence is a place in the data.
    return found | _named("training", job["training"], ("seq_len",))


def _tokenizer(job: Job) -> dict[str, Any]:
    table = job["tokenizer"]
    found = _named("tokenizer", table, table)
    folder = Path(job["model"]["hf_assets_path"])
    if table["name"] == "huggingface":
        # By content, since a folder may be moved.
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                found[name] = Entry.of(folder / name).xxh3_128
    return found


def _versions() -> dict[str, str]:
    found = {"nitp_titan": __version__}
    for name in ("torch", "torchtitan", "torchao"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "?"
    return found


def _commit() -> str | None:
    """Return the commit of the checkout that this file is of; None for an installed package."""
    here = Path(__file__).parent
    try:
        ours = subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, timeout=10
        )
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if ours.returncode == done.returncode == 0 else None
