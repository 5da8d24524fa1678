"""``[faults]`` within its ranges."""

from __future__ import annotations

from collections.abc import Iterator

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem
from nitp_titan.training.faults_config import FaultsConfig


def check_faults(draft: Draft) -> Iterator[Problem]:
    """Every key of [faults] is within its range."""
    # As an object that __post_init__ has not refused.
    config = FaultsConfig()
    for key, value in draft.table("faults").items():
        setattr(config, key, value)
    for key, message in config.problems():
        yield draft.problem("faults", key, message)
