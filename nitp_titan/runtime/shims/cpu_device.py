"""The CPU as a TorchTitan device: a ``device_module`` over ``torch.cpu``."""

from __future__ import annotations

import os
import platform
import resource
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils

from nitp_titan.runtime.shims.shim import Shim


def on_cpu() -> bool:
    """Whether torch sees no accelerator that FSDP trains on (Apple's mps is not one)."""
    return torch._utils._get_available_device_type() in (None, "mps")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "CPU"


class CPUDeviceModule:
    """The part of ``torch.cuda``'s interface that TorchTitan calls, for a CPU.

    Memory is the process's resident set: ``active`` and ``reserved`` are both its peak.
    """

    current_stream = staticmethod(torch.cpu.current_stream)
    stream = staticmethod(torch.cpu.stream)
    synchronize = staticmethod(torch.cpu.synchronize)
    Stream = torch.cpu.Stream
    Event = torch.cpu.Event

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None:
        """There is one CPU device: every choice is it."""

    def get_device_name(self, device: Any = None) -> str:
        return _cpu_name()

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return SimpleNamespace(name=_cpu_name(), total_memory=total_memory)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_bytes = peak if sys.platform == "darwin" else peak * 1024
        return {
            "active_bytes.all.peak": peak_bytes,
            "reserved_bytes.all.peak": peak_bytes,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """The operating system's peak cannot be reset."""

    def empty_cache(self) -> None:
        """There is no caching allocator."""


def _use_cpu() -> None:
    import torchtitan.tools.utils as tools

    before = tools.device_module
    tools.device_type, tools.device_module = "cpu", CPUDeviceModule()
    # Modules that are imported already have taken both by name.
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan."):
            if getattr(module, "device_module", None) is before:
                module.device_module = tools.device_module
            if isinstance(getattr(module, "device_type", None), str):
                module.device_type = tools.device_type


SHIMS = [
    Shim(
        target="torchtitan.tools.utils.device_type, device_module",
        reason='without an accelerator TorchTitan takes "cuda" for the device',
        until="a TorchTitan release that trains on a CPU",
        applies=on_cpu,
        apply=_use_cpu,
    ),
]
