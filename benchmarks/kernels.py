"""Where a training step's time goes on its device, kernel by kernel: what a roofline is laid beside.

On a GPU the kernels that ran, by name, with the time in which none did; on a CPU torch's operators, each without those
that it calls, which shows that the program works.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 60
"""Kernels that are named, those of most time; the rest is one row."""

# The first pattern that is found in a kernel's name is its group.
_GROUPS = (
    ("attention", r"flex_attention|flash|fmha|attention"),
    ("communication", r"nccl"),
    # Before all that is not inductor's own, since its kernels are named after every operator that they fuse.
    ("compiled elementwise work and reductions", r"^triton_"),
    # cuBLASLt's and CUTLASS's mangled names.
    ("grouped products", r"grouped|GroupProblem|17Group|moe_gemm"),
    ("products", r"nvjet|gemm|cutlass|cublas|xmma|wgmma|splitkreduce|aten::(add)?mm\b|aten::b?mm\b|aten::_scaled_mm"),
    ("optimizer and clipping", r"multi_tensor|foreach|adam|lpnorm"),
    ("copies", r"memcpy|memset|cat_?array|split_with_sizes|chunk_cat|direct_copy|copy_kernel|aten::copy_|aten::cat\b"),
)
OTHERS = "others"


class Kernel(NamedTuple):
    """One run of a kernel."""

    name: str
    start_ns: int
    duration_ns: int


def profile_step(run: Callable[[], Any], device_type: str) -> dict[str, Any]:
    """Run one step under torch's profiler and return where its time went.

    Returns:
        ``wall_ms`` (with the profiler on), and of a GPU ``busy_ms``, in which at least one kernel ran, and ``idle_ms``;
        ``groups``: name -> ms; ``kernels``: of most time, each with name, group, count and ms, the last row for the
        rest.
    """
    on_gpu = device_type != "cpu"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    device: Any = torch.get_device_module(device_type)
    with torch.profiler.profile(activities=activities) as profile:
        device.synchronize()
        begin = time.perf_counter()
        run()
        device.synchronize()
        wall_ms = 1e3 * (time.perf_counter() - begin)
    if on_gpu:
        ran = kernels_of(profile)
        busy_ms = busy_ns(ran) / 1e6
        return {"wall_ms": round(wall_ms, 3), "busy_ms": round(busy_ms, 3), "idle_ms": round(wall_ms - busy_ms, 3)} | (
            summarize((kernel.name, 1, kernel.duration_ns / 1e6) for kernel in ran)
        )
    rows = ((row.key, row.count, row.self_cpu_time_total / 1e3) for row in profile.key_averages())
    return {"wall_ms": round(wall_ms, 3)} | summarize(rows)


def kernels_of(profile: torch.profiler.profile) -> list[Kernel]:
    """Return what ran on the GPU, copies and fills included."""
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    return [
        Kernel(event.name(), event.start_ns(), event.duration_ns())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA
        and event.duration_ns() > 0
        # Ranges that a program marks are shown on the device, too, over the kernels that they hold.
        and not event.is_user_annotation()
    ]


def busy_ns(kernels: Iterable[Kernel]) -> int:
    """Return the time in which at least one of the kernels ran."""
    busy = until = 0
    for _, start, duration in sorted(kernels, key=lambda kernel: kernel.start_ns):
        end = start + duration
        busy += max(0, end - max(start, until))
        until = max(until, end)
    return busy


def group_of(name: str) -> str:
    """Return the group of a kernel."""
    return next((group for group, pattern in _GROUPS if re.search(pattern, name, re.IGNORECASE)), OTHERS)


def summarize(runs: Iterable[tuple[str, int, float]]) -> dict[str, Any]:
    """Add up runs of kernels (name, count, ms) by name and by group."""
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, count, ms in runs:
        by_name[name][0] += count
        by_name[name][1] += ms
    ordered = sorted(by_name.items(), key=lambda item: -item[1][1])
    groups: dict[str, float] = defaultdict(float)
    for name, (_, ms) in ordered:
        groups[group_of(name)] += ms
    rows = [
        {"name": name[:200], "group": group_of(name), "count": int(count), "ms": round(ms, 4)}
        for name, (count, ms) in ordered[:ROWS]
    ]
    if rest := ordered[ROWS:]:
        count, ms = (sum(values[i] for _, values in rest) for i in (0, 1))
        rows.append({"name": f"{len(rest)} more", "group": OTHERS, "count": int(count), "ms": round(ms, 4)})
    in_order = sorted(groups.items(), key=lambda item: -item[1])
    return {"groups": {name: round(ms, 4) for name, ms in in_order}, "kernels": rows}


def table(name: str, found: dict[str, Any], rows: int = 24) -> Table:
    """Return a step's kernels of most time for the console."""
    from rich.table import Table

    shown = Table(title=f"{name}: a step of {found['wall_ms']:.1f} ms under the profiler")
    for column in ("ms", "times"):
        shown.add_column(column, justify="right")
    shown.add_column("group", no_wrap=True)
    shown.add_column("kernel", no_wrap=True, max_width=90)
    for row in found["kernels"][:rows]:
        shown.add_row(f"{row['ms']:.3f}", str(row["count"]), row["group"], row["name"][:90])
    parts = [f"{group} {ms:.1f}" for group, ms in found["groups"].items()]
    if "idle_ms" in found:
        parts.append(f"nothing ran {found['idle_ms']:.1f}")
    shown.caption = "ms by group: " + ", ".join(parts)
    shown.caption_justify = "left"
    return shown
