"""Where results lie and what every one of them says of the machine that made it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def machine_facts() -> dict[str, Any]:
    """Return ``device``, ``device_type``, ``torch``, ``torchtitan``, ``commit`` and ``ranks`` of this process.

    ``nitp_titan.runtime.prepare()`` has been called.
    """
    import importlib.metadata

    import torch
    from torchtitan.tools import utils

    distributed = torch.distributed.is_initialized()
    gpu = {} if utils.device_type == "cpu" else {"gpu": gpu_facts()}
    return {
        "device": utils.device_module.get_device_name(),
        "device_type": utils.device_type,
        **gpu,
        "torch": torch.__version__,
        "torchtitan": importlib.metadata.version("torchtitan"),
        "commit": commit(),
        "ranks": torch.distributed.get_world_size() if distributed else 1,
    }


_ASKED = {
    "driver": "driver_version",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "memory_mib": "memory.total",
}


def gpu_facts() -> dict[str, str | float]:
    """Return driver, clocks, power limit and memory of the first GPU, as nvidia-smi says; {} where there is none."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_ASKED.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.splitlines()[0].split(", ")
    named = dict(zip(_ASKED, values, strict=True))
    return {name: float(value) if value.replace(".", "", 1).isdigit() else value for name, value in named.items()}


def commit() -> str:
    """Return ``$COMMIT`` where it is set, else the checkout's commit, ``-dirty`` where files differ from it, or "?"."""
    if named := os.environ.get("COMMIT"):
        return named

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    found = git("rev-parse", "HEAD")
    # A copy of the files inside another project's checkout has that one's commit.
    if not found or git("rev-parse", "--show-toplevel") != str(ROOT.resolve()):
        return "?"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return f"{found}-dirty" if changed else found


def default_path(program: str, subject: str, device: str, device_type: str) -> Path:
    """Return ``results/DEVICE/PROGRAM-SUBJECT.json``; all CPUs share a folder, since their times tell nothing."""
    folder = "cpu" if device_type == "cpu" else slug(device.replace("NVIDIA", ""))
    name = f"{program}-{slug(subject)}" if subject else program
    return RESULTS / folder / f"{name}.json"


def slug(text: str) -> str:
    """Return a text as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def check_writable(path: Path) -> None:
    """Make a result's folder, before anything is measured.

    Raises:
        ValueError: the result could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        folder_is_a_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = f"{path.parent} is not a folder" if folder_is_a_file else error.strerror
        raise ValueError(f"--out: {path} cannot be written: {reason}") from None
    if path.is_dir():
        raise ValueError(f"--out: {path} is a folder, expected a JSON file")


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)
