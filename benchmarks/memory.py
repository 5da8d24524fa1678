"""The peak of memory that some work needs: the allocator's own count on a GPU, every allocation's on a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Usage(NamedTuple):
    """Bytes above what was in use before some work began."""

    peak: int
    """At most, while it ran."""
    kept: int
    """When it had ended, by what it returned."""


def usage_of(work: Callable[[], Any], device_type: str) -> Usage:
    """Run ``work`` and return what memory it took."""
    gc.collect()
    if device_type == "cpu":
        return _profiled(work)
    device = torch.get_device_module(device_type)
    device.synchronize()
    before = device.memory_allocated()
    device.reset_peak_memory_stats()
    held = work()
    device.synchronize()
    usage = Usage(device.max_memory_allocated() - before, device.memory_allocated() - before)
    del held
    return usage


def collect(device_type: str) -> None:
    """Give back what nobody holds any more: a trainer turns Python's own collection off."""
    gc.collect()
    if device_type != "cpu":
        torch.get_device_module(device_type).empty_cache()


def in_use(device_type: str) -> int:
    """Return the bytes that tensors on a GPU take; 0 on a CPU, which does not count them."""
    return 0 if device_type == "cpu" else torch.get_device_module(device_type).memory_allocated()


def _profiled(work: Callable[[], Any]) -> Usage:
    """The resident set of a process tells little of its tensors: the profiler sees each allocation and release.

    What was there before and is released meanwhile is not seen: it counts as staying.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        held = work()
    del held
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return Usage(peak, now)
