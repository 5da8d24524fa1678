"""What a job needs to know of the machine, found without importing torch (seconds).

A job may be looked at on another machine than it is meant for: inside :func:`meant_for` the answers are that one's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from nitp_titan.runtime.versions import release

# Present exactly where a driver lets this process reach a GPU: NVIDIA, NVIDIA under WSL, AMD.
_GPU_NODES = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd")

_GPU_FOLDERS = Path("/proc/driver/nvidia/gpus")

DEVICES = ("here", "h100", "cpu")
"""What :func:`meant_for` takes: this machine, one with an H100, one without a GPU."""
_device: ContextVar[str] = ContextVar("device", default="here")

HOPPER, BLACKWELL = (9, 0), (10, 0)
_MODELS = {r"\bG?H(100|200|800|20)\b": HOPPER, r"\bG?B(100|200|300)\b": BLACKWELL}


@contextlib.contextmanager
def meant_for(device: str) -> Iterator[None]:
    """Inside, the machine is one with this device (of ``DEVICES``), and with the packages of this one."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


def device() -> str:
    """Return the device that the answers are about, of ``DEVICES``."""
    return _device.get()


def usual_device(flavor: str) -> str:
    """Return the device that a job is meant for where nobody says: a GPU, but for debug models, which run anywhere."""
    return "here" if has_gpu() or is_small(flavor) else "h100"


def is_small(flavor: str) -> bool:
    """Whether a flavor is a debug model's."""
    return flavor.startswith("debug")


@functools.cache
def torch_version() -> tuple[int, int]:
    """Return (major, minor) of the installed torch."""
    found = release(_torch_version_text())
    assert found > (0, 0), f"torch's version is not a version: {_torch_version_text()}"
    return found


def records_attention() -> bool:
    """Whether a CUDA graph of a step takes the next one's attention masks.

    TorchTitan compares the structure of flex attention's masks. Up to torch 2.12 it has the mask function in it, a new
    one in every step.
    """
    return torch_version() >= (2, 13)


def has_gpu() -> bool:
    """Whether training will find a GPU: a device node, not hidden, and a torch that was built for one."""
    if _device.get() != "here":
        return _device.get() == "h100"
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if os.environ.get(variable, "0").strip() in ("", "-1"):
            return False
    if "+cpu" in _torch_version_text():
        return False
    root = Path("/")
    return any(next(root.glob(pattern.lstrip("/")), None) for pattern in _GPU_NODES)


def gpu_capability() -> tuple[int, int] | None:
    """Return the compute capability of the GPU where its name tells (Hopper, Blackwell), without asking CUDA."""
    if _device.get() != "here" or not has_gpu():
        return HOPPER if _device.get() == "h100" else None
    for file in _GPU_FOLDERS.glob("*/information"):
        text = file.read_text(encoding="utf-8", errors="replace")
        return next((capability for model, capability in _MODELS.items() if re.search(model, text)), None)
    return None


def has_module(name: str) -> bool:
    """Whether there is such a module, without running any of it: of TorchTitan's own packages that takes seconds."""
    first, *rest = name.split(".")
    package = importlib.util.find_spec(first)
    if package is None or not rest:
        return package is not None
    files = [
        Path(place, *rest[:-1], file)
        for place in package.submodule_search_locations or ()
        for file in (f"{rest[-1]}.py", f"{rest[-1]}/__init__.py")
    ]
    return any(file.exists() for file in files)


def _torch_version_text() -> str:
    return importlib.metadata.version("torch")
