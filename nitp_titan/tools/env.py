"""What this machine is, and what of nitp_titan works on it: ``nitp-titan env``.

The facts are the rows of ``FEATURES``: a name, and what the torch version and the device make of it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path

import nitp_titan
from nitp_titan.runtime.support import Device, dotted, what_works
from nitp_titan.runtime.versions import release

PACKAGES = ("torch", "torchtitan", "torchao", "triton", "datasets", "spmd_types", "transformers", "nitp_titan")
TORCH_RANGE = ((2, 11), (2, 16))
"""The first torch (major, minor) that nitp_titan is made for, and the first that it is not."""
TORCHTITAN = (0, 3)


def installed_versions() -> dict[str, str | None]:
    """The version of each of ``PACKAGES``; None = not installed. Imports none of them."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["nitp_titan"] = versions["nitp_titan"] or nitp_titan.__version__  # a checkout that is not installed
    return versions


def version_warnings(versions: Mapping[str, str | None]) -> list[str]:
    found = []
    torch = versions.get("torch")
    first, last = TORCH_RANGE
    wanted = f">={dotted(first)},<{dotted(last)}"
    if torch is None:
        found.append(f"torch is not installed; nitp_titan needs torch{wanted}")
    elif not first <= release(torch) < last:
        found.append(f"torch {torch} is outside {wanted}, the range that nitp_titan is made for")
    torchtitan = versions.get("torchtitan")
    if torchtitan is None:
        found.append(f"torchtitan is not installed; nitp_titan needs torchtitan=={dotted(TORCHTITAN)}.*")
    elif release(torchtitan) != TORCHTITAN:
        found.append(f"torchtitan {torchtitan} is not {dotted(TORCHTITAN)}.*, the release that nitp_titan extends")
    return found


def find_device() -> Device:
    """The device that a run would train on here.

    Raises:
        ImportError, OSError: torch cannot be imported.
    """
    import torch

    distributed = torch.distributed
    backends = tuple(
        name
        for name in ("nccl", "gloo")
        if distributed.is_available() and getattr(distributed, f"is_{name}_available")()
    )
    with warnings.catch_warnings(record=True) as complaints:  # of a driver that is too old, for one
        warnings.simplefilter("always")
        has_gpu = torch.cuda.is_available()
    if not has_gpu:
        details = []
        memory = _memory_gib()
        if memory is not None:
            details.append(("memory", f"{memory:.1f} GiB"))
        driver = _nvidia_driver()
        if torch.version.cuda or torch.version.hip:
            built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
            found = f"NVIDIA driver {driver or 'not found'}"
            says = "".join(f"; torch: {str(complaint.message).splitlines()[0]}" for complaint in complaints[:1])
            details.append(("GPU", f"none usable: torch is built for {built_for}, {found}{says}"))
        elif driver:
            details.append(("GPU", f"NVIDIA driver {driver} is here, but this torch is built for CPUs only"))
        return Device(
            type="cpu",
            name=_cpu_name(),
            count=_num_cores(),
            backends=backends,
            compiler=_find_compiler(os.environ.get("CXX"), "clang++" if sys.platform == "darwin" else "g++"),
            details=tuple(details),
        )

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    memory = sorted({f"{gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus})
    details = [("memory", " / ".join(memory) + (" each" if len(gpus) > 1 else ""))]
    capability = min((gpu.major, gpu.minor) for gpu in gpus)
    if torch.version.hip:
        details.append(("runtime", f"ROCm {torch.version.hip}"))
    else:
        details.append(("capability", dotted(capability)))
        details.append(("runtime", f"CUDA {torch.version.cuda}, driver {_nvidia_driver() or 'unknown'}"))
    return Device(
        type="rocm" if torch.version.hip else "cuda",
        name=" / ".join(dict.fromkeys(gpu.name for gpu in gpus)),
        count=len(gpus),
        capability=None if torch.version.hip else capability,
        backends=backends,
        compiler=_find_compiler(os.environ.get("CC"), "gcc", "clang", "cc"),
        details=tuple(details),
    )


def _find_compiler(*candidates: str | None) -> str | None:
    return next((candidate for candidate in candidates if candidate and shutil.which(candidate)), None)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    """Memory of the machine, or of the container where that is less."""
    sizes = []
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    if total:
        sizes.append(int(total[1]) * 1024)
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        sizes.append(int(limit))
    return min(sizes) / 2**30 if sizes else None


def _nvidia_driver() -> str | None:
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", _read("/proc/driver/nvidia/version"))
    if found:
        return found[1]
    try:
        query = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return query.stdout.split("\n")[0].strip() or None if query.returncode == 0 else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


# The report ------------------------------------------------------------------------------------------


def environment_report() -> str:
    """Versions, devices and what works with them, as plain text in aligned columns."""
    versions = installed_versions()
    try:
        device, failure = find_device(), None
    except (ImportError, OSError, RuntimeError) as error:  # a missing library; a driver that torch cannot talk to
        device, failure = None, f"{type(error).__name__}: {error}".splitlines()[0]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return render_report(versions, device, failure=failure, width=width)


def render_report(
    versions: Mapping[str, str | None], device: Device | None, *, failure: str | None = None, width: int | None = None
) -> str:
    """``width``: the columns to wrap long lines to; None keeps every fact on one line."""
    notices = version_warnings(versions)
    sections = [("Versions", [(name, version or "not installed") for name, version in versions.items()])]
    if device is None:
        if versions.get("torch") is not None:
            notices.append(f"torch cannot be imported, so nothing more can be said: {failure}")
    else:
        if device.is_gpu:
            lines = [("GPU", f"{device.count} x {device.name}")]
        else:
            lines = [("CPU", f"{device.name}, {device.count} core{'s' if device.count > 1 else ''}")]
        sections.append(("Device", [*lines, *device.details]))
        torch = versions.get("torch")
        if torch is not None:
            rows = what_works(release(torch), device)
            verdicts = [(row.name, f"{'yes' if row.works else 'no ':<3}  {row.reason}") for row in rows]
            sections.append(("What works here", verdicts))
    text = []
    label_width = max(len(label) for _, lines in sections for label, _ in lines)
    for title, lines in sections:
        text.append(title)
        hang = " " * (label_width + 4 + (5 if title == "What works here" else 0))
        for label, value in lines:
            text.append(_wrap(f"  {label:<{label_width}}  {value}".rstrip(), width, hang))
        text.append("")
    text += [_wrap(f"Warning: {warning}", width, " " * 9) for warning in notices]
    return "\n".join(text).rstrip() + "\n"


def _wrap(line: str, width: int | None, hang: str) -> str:
    if width is None or len(line) <= width:
        return line
    width = max(width, len(hang) + 20)  # a narrower terminal wraps by itself
    # Only the text after the label's column is wrapped, so that the alignment stays.
    rest = textwrap.wrap(line[len(hang) :], width - len(hang), break_on_hyphens=False) or [""]
    return line[: len(hang)] + ("\n" + hang).join(rest)
