"""The ``[faults]`` table of a job. Free of torch, so that a job file is checked without importing it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

OnNonfinite = Literal["stop", "skip"]
FEWEST = 4
"""Values of which a standard deviation says something."""


@dataclass(kw_only=True, slots=True)
class FaultsConfig:
    """What becomes of a step whose loss or gradient is not finite, or far above those of the steps before.

    Such a step changes nothing: neither weights nor moments nor router biases. The device decides so before the
    optimizer's step, alike on all ranks. Learning rate and data go on. Counts and windows are this process's: they
    begin anew when a run is resumed.

    Raises:
        ValueError: a value outside its range; the message names every such key.
    """

    on_nonfinite: OnNonfinite = "stop"
    """After a step with a loss or gradient that is not finite, which changes nothing: "stop" ends the run with exit
    code 3, at the latest metrics.log_freq steps later; "skip" goes on with the next step."""

    max_skips_in_a_row: int = 10
    """Steps that may be skipped one after the other, for whatever reason; one more ends the run with exit code 3."""

    loss_spike_sigma: float = 0.0
    """A step is skipped whose loss is more than so many standard deviations above the mean of the last spike_window
    steps' (OLMo-core has 6). 0 = off."""

    grad_norm_spike_sigma: float = 0.0
    """The same of the gradient's norm before it is clipped. 0 = off."""

    spike_window: int = 128
    """Steps by whose losses and norms a spike is judged, skipped ones included as long as they are finite; none is
    judged before there are half as many."""

    @property
    def judges_spikes(self) -> bool:
        """Whether a finite step may be skipped."""
        return self.loss_spike_sigma > 0 or self.grad_norm_spike_sigma > 0

    def __post_init__(self) -> None:
        if problems := [f"faults.{key}: {message}" for key, message in self.problems()]:
            raise ValueError("; ".join(problems))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) for every value outside its range."""
        if self.on_nonfinite not in get_args(OnNonfinite):
            yield "on_nonfinite", f'found {self.on_nonfinite!r}, expected "stop" or "skip"'
        for key, lowest in (("max_skips_in_a_row", 1), ("spike_window", FEWEST)):
            value = getattr(self, key)
            if value < lowest:
                yield key, f"found {value}, expected at least {lowest}"
        for key in ("loss_spike_sigma", "grad_norm_spike_sigma"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                yield key, f"found {value}, expected a finite number of standard deviations, or 0 for off"
