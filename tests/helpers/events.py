"""Metrics of made-up runs, as event files and as metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from nitp_titan.runs.scalars import Scalars

TOTAL = "loss_metrics/global_avg_loss"
NTP = "loss_metrics/ntp_loss"
NITP = "loss_metrics/nitp_loss"


def nitp_run(num_steps: int = 200, *, seed: int = 0) -> Scalars:
    """Curves like those of a short run: every panel's tags, geometry and validation at a few steps only."""
    noise = np.random.default_rng(seed)
    steps = range(1, num_steps + 1)
    ntp = [(s, 2 + 3 * math.exp(-s / 40) + noise.normal(0, 0.05)) for s in steps]
    nitp = [(s, 0.05 + math.exp(-s / 10) + noise.normal(0, 0.01)) for s in steps]
    few = [s for s in steps if s == 1 or s % 50 == 0]
    return {
        NTP: ntp,
        NITP: nitp,
        TOTAL: [(s, a + b) for (s, a), (_, b) in zip(ntp, nitp, strict=True)],
        "validation_metrics/loss": [(s, 2.5 + 1 / s) for s in few],
        "validation_metrics/ntp_loss": [(s, 2.3 + 1 / s) for s in few],
        "validation_metrics/nitp_loss": [(s, 0.2) for s in few],
        "geometry/effective_rank": [(s, 60 + s / 10) for s in few],
        "geometry/mean_cosine_similarity": [(s, 0.3 + s / 1000) for s in few],
        "moe/max_load": [(s, 1 + 1 / s) for s in steps],
        "throughput(tps)": [(s, 6000.0 + s) for s in steps],
        "grad_norm": [(s, 1.0) for s in steps],
    }


def stock_run(num_steps: int = 200) -> Scalars:
    """What stock TorchTitan logs: the total loss alone."""
    run = nitp_run(num_steps, seed=1)
    return {tag: run[tag] for tag in (TOTAL, "throughput(tps)", "validation_metrics/loss")}


def write_events(run_dir: Path, scalars: Scalars, start: str = "20260801-1200") -> Path:
    writer = SummaryWriter(run_dir / "tb" / start)
    for tag, points in scalars.items():
        for step, value in points:
            writer.add_scalar(tag, value, step)
    writer.close()
    return run_dir


def write_metrics(run_dir: Path, scalars: Scalars) -> Path:
    lines: dict[int, dict[str, float]] = {}
    for tag, points in scalars.items():
        for step, value in points:
            lines.setdefault(step, {"step": step})[tag] = value
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(lines[step]) + "\n" for step in sorted(lines)))
    return run_dir
