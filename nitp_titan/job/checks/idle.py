"""What a job that can run computes for nothing, or asks for and does not get."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nitp_titan.job.draft import Draft


def idle_doubts(draft: Draft) -> Iterator[str]:
    """Yield a line for each value with which a run goes through its steps and trains nothing, or less than it says."""
    if draft.get("nitp", "enable") and draft.get("nitp", "weight") == 0:
        yield "nitp.weight is 0: NITP is computed and logged, and trains nothing; nitp.enable = false is the baseline"
    if draft.get("optimizer", "lr") == 0:
        yield "optimizer.lr is 0: nothing trains"
    if draft.get("checkpoint", "enable") and draft.get("checkpoint", "create_seed_checkpoint"):
        yield "checkpoint.create_seed_checkpoint saves the model at step 0: nothing trains"
    every, interval = draft.get("checkpoint", "keep_every"), draft.get("checkpoint", "interval")
    if draft.get("checkpoint", "enable") and draft.get("checkpoint", "keep_latest_k") and every and every % interval:
        both = math.lcm(every, interval)
        kept = f"those of every {both:,} steps are kept for good"
        yield f"checkpoint.keep_every is {every}, and one is saved every {interval} steps: {kept}"
    if draft.get("training", "seq_len") == 1 and draft.get("nitp", "enable") and draft.get("nitp", "shift"):
        yield "training.seq_len is 1: no token has a next one, and NITP trains nothing"
    if (mode := draft.get("comm", "mode")) in ("fake_backend", "local_tensor"):
        yield f'comm.mode is "{mode}", for looking at a run: ranks exchange nothing, and nothing trains'


def profile_doubts(draft: Draft) -> Iterator[str]:
    """Yield a line where a run ends before the profiler records."""
    if not draft.get("profiler", "enable_profiling"):
        return
    freq, warmup, active = (draft.get("profiler", f"profile{k}") for k in ("_freq", "r_warmup", "r_active"))
    skipped, waitless = (draft.get("profiler", f"profiler_skip_first{k}") or 0 for k in ("", "_wait"))
    steps, before = draft.get("training", "steps"), skipped + (warmup if waitless else freq - active)
    if steps <= before:
        records = f"profiler.enable_profiling records from step {before + 1} on"
        yield f"{records}, after training.steps {steps}: no trace has a step"
