"""What a job needs to know of the machine, found without importing torch (seconds)."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from pathlib import Path

from nitp_titan.versions import release

# Present exactly where a driver lets this process reach a GPU: NVIDIA, NVIDIA under WSL, AMD.
_GPU_NODES = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd")


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
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if os.environ.get(variable, "0").strip() in ("", "-1"):
            return False
    if "+cpu" in _torch_version_text():
        return False
    root = Path("/")
    return any(next(root.glob(pattern.lstrip("/")), None) for pattern in _GPU_NODES)


def _torch_version_text() -> str:
    return importlib.metadata.version("torch")
