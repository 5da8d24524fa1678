"""Which steps are skipped, which one ends a run, and what is said, against a reimplementation in plain Python."""

from __future__ import annotations

import random

import pytest
import torch

from nitp_titan.training.decisions import GRADIENT, LOSS, LOSS_SPIKE, NORM, NORM_SPIKE, Decisions, ending, skipping
from nitp_titan.training.faults_config import FaultsConfig

WORLD = 4


def decide(config: FaultsConfig, reasons: list[tuple[int, int]]) -> tuple[list[bool], Decisions]:
    """Return whether each step is skipped, for (reason, rank) of steps 1, 2, ..."""
    decisions = Decisions(config, torch.device("cpu"), WORLD)
    skipped = []
    for step, (reason, rank) in enumerate(reasons, start=1):
        decisions.take(step, decisions.code(torch.tensor(reason), rank))
        skipped.append(bool(decisions.skip))
    return skipped, decisions


def decide_plainly(config: FaultsConfig, reasons: list[tuple[int, int]]):
    skipped, row, cause = [], [], None
    for step, (reason, rank) in enumerate(reasons, start=1):
        row = [*row, (step, reason, rank)] if reason or cause else []
        skipped.append(bool(row))
        if cause is None and reason >= NORM and config.on_nonfinite == "stop":
            cause = row[-1]
        if cause is None and len(row) > config.max_skips_in_a_row:
            cause = row[0]
    return skipped, cause


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_decisions_are_those_of_plain_python(seed, on_nonfinite):
    generator = random.Random(seed)
    config = FaultsConfig(on_nonfinite=on_nonfinite, max_skips_in_a_row=3, loss_spike_sigma=6)
    for _ in range(20):
        bad = generator.choice([0.1, 0.5])
        nonfinite = generator.choice([0.0, 0.5, 1.0])
        reasons = []
        for _ in range(12):
            kinds = (NORM, GRADIENT, LOSS) if generator.random() < nonfinite else (NORM_SPIKE, LOSS_SPIKE)
            reason = generator.choice(kinds) if generator.random() < bad else 0
            reasons.append((reason, generator.randrange(WORLD)))
        skipped, decisions = decide(config, reasons)
        expected, cause = decide_plainly(config, reasons)
        seen = decisions.read()
        assert skipped == expected
        assert seen.skipped == sum(expected)
        assert seen.stopped == (cause is not None)
        if cause is not None:
            assert (seen.cause.step, seen.cause.reason, seen.cause.rank) == cause
        last = max((step for step, (reason, _) in enumerate(reasons, start=1) if reason), default=0)
        assert seen.last.step == last


def test_of_all_ranks_the_worst_reason_counts_and_its_first_rank():
    decisions = Decisions(FaultsConfig(), torch.device("cpu"), WORLD)
    views = [(0, 0), (GRADIENT, 1), (LOSS, 2), (LOSS, 3)]
    codes = torch.stack([decisions.code(torch.tensor(reason), rank) for reason, rank in views])
    decisions.take(7, codes.amax())
    cause = decisions.read().cause
    assert (cause.step, cause.reason, cause.rank) == (7, LOSS, 2)


def test_what_is_said():
    stop, skip = FaultsConfig(), FaultsConfig(on_nonfinite="skip", max_skips_in_a_row=1, loss_spike_sigma=6)
    _, decisions = decide(stop, [(0, 0), (GRADIENT, 3), (LOSS, 0)])
    assert ending(decisions.read(), stop, "run/checkpoint/step-1") == (
        "step 2: its gradient is not finite, first on rank 3; no weight has changed since the step before, and the "
        'last checkpoint is run/checkpoint/step-1 (faults.on_nonfinite = "skip" would go on without it)'
    )
    _, decisions = decide(skip, [(0, 0), (LOSS_SPIKE, 0), (LOSS, 0)])
    assert ending(decisions.read(), skip, "") == (
        "step 2: its loss is more than 6 standard deviations above the last 128 steps' mean, and it was the first of "
        "more than 1 skipped steps in a row (faults.max_skips_in_a_row = 1); no weight has changed since, and there "
        "is no checkpoint before it"
    )
    _, decisions = decide(skip, [(LOSS, 2), (0, 0)])
    assert skipping(decisions.read(), skip) == (
        "1 step has been skipped since the start of this process, the last one step 1: its loss is not finite, "
        "first on rank 2. Such a step changes no weight"
    )
