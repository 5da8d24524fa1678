"""What a run's device has decided of its steps, how the host reads it, and how it says it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nitp_titan.training.faults_config import FaultsConfig

NORM_SPIKE, LOSS_SPIKE, NORM, GRADIENT, LOSS = range(1, 6)
"""Why a step is skipped, the worst last; 0 is a good step. From NORM on a number is not finite."""

WORDS = {
    NORM_SPIKE: "its gradient's norm is more than {norm_sigma} standard deviations above the last {window} steps' mean",
    LOSS_SPIKE: "its loss is more than {loss_sigma} standard deviations above the last {window} steps' mean",
    NORM: "its gradient's norm is not finite",
    GRADIENT: "its gradient is not finite, first on rank {rank}",
    LOSS: "its loss is not finite, first on rank {rank}",
}
"""What is said of a step after "step N: "."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A step that was skipped, why, and the first rank that had the reason."""

    step: int
    reason: int
    rank: int

    def said(self, config: FaultsConfig) -> str:
        """Return what was wrong with the step."""
        return WORDS[self.reason].format(
            rank=self.rank,
            norm_sigma=f"{config.grad_norm_spike_sigma:g}",
            loss_sigma=f"{config.loss_spike_sigma:g}",
            window=config.spike_window,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What the host has read of the decisions after a step."""

    stopped: bool
    """No step after the cause has changed anything, and none will."""

    cause: Event
    """The first bad step: what ended the run, or the first of too many in a row."""

    last: Event
    """The last step that was skipped."""

    skipped: int
    """Steps that were skipped so far."""

    in_a_row: int
    """How many of them were the last ones."""


class Decisions:
    """Decides on the device of one step after the other; every rank that is given the same does the same."""

    def __init__(self, config: FaultsConfig, device: torch.device, world_size: int):
        self._stops = config.on_nonfinite == "stop"
        self._limit, self._world = config.max_skips_in_a_row, world_size
        self.skip = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the last step is left out, 0-d bool."""
        self._stopped = torch.zeros((), dtype=torch.bool, device=device)
        self._skipped, self._in_a_row = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        # Of each (step, code).
        self._first, self._cause, self._last = (torch.zeros(2, dtype=torch.int64, device=device) for _ in range(3))

    def code(self, reason: Tensor, rank: int) -> Tensor:
        """Return a rank's view of a step; the largest of all ranks' has the worst reason and the first rank with it."""
        return reason * self._world + (self._world - 1 - rank)

    def take(self, step: int, code: Tensor) -> None:
        """Decide of a step: the largest of all ranks' codes (0-d int64)."""
        reason = code // self._world
        bad, nonfinite = reason > 0, reason >= NORM
        now = torch.stack([torch.full_like(code, step), code])
        self.skip = bad | self._stopped
        self._skipped = self._skipped + self.skip
        self._in_a_row = (self._in_a_row + 1) * self.skip
        self._first = torch.where(self._in_a_row == 1, now, self._first)
        self._last = torch.where(bad, now, self._last)
        ends, cause = self._in_a_row > self._limit, self._first
        if self._stops:
            ends, cause = ends | nonfinite, torch.where(nonfinite, now, cause)
        self._cause = torch.where(ends & ~self._stopped, cause, self._cause)
        self._stopped = self._stopped | ends

    def read(self) -> Seen:
        """Return what the host may know, for which it waits."""
        numbers = torch.stack([self._stopped.long(), self._skipped, self._in_a_row])
        stopped, skipped, in_a_row, *events = torch.cat([numbers, self._cause, self._last]).tolist()
        return Seen(
            stopped=bool(stopped),
            cause=self._event(*events[:2]),
            last=self._event(*events[2:]),
            skipped=skipped,
            in_a_row=in_a_row,
        )

    def _event(self, step: int, code: int) -> Event:
        return Event(step=step, reason=code // self._world, rank=self._world - 1 - code % self._world)


def ending(seen: Seen, config: FaultsConfig, checkpoint: str) -> str:
    """Return the sentence with which a run ends.

    Args:
        checkpoint: the newest complete one of a step before the cause; "" for none.
    """
    cause = seen.cause
    left = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint before it"
    what = f"step {cause.step}: {cause.said(config)}"
    if cause.reason < NORM or config.on_nonfinite != "stop":
        limit = config.max_skips_in_a_row
        return (
            f"{what}, and it was the first of more than {limit} skipped steps in a row "
            f"(faults.max_skips_in_a_row = {limit}); no weight has changed since, and {left}"
        )
    hint = 'faults.on_nonfinite = "skip" would go on without it'
    return f"{what}; no weight has changed since the step before, and {left} ({hint})"


def skipping(seen: Seen, config: FaultsConfig) -> str:
    """Return what is said of skipped steps in a run that goes on."""
    steps = "1 step has" if seen.skipped == 1 else f"{seen.skipped} steps have"
    return f"{steps} been skipped since the start of this process, the last one step {seen.last.step}: " + (
        f"{seen.last.said(config)}. Such a step changes no weight"
    )
