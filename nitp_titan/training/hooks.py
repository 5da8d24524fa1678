"""The moments of a run on which observers hang, and what else watches a run: one seam, and no edits of the trainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

Name = Literal["begin_step", "end_micro_batch", "before_optimizer", "end_step", "saved", "close"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """Where a run is."""

    step: int
    """The step, counted from 1 on over restarts."""

    logged: bool
    """Whether its metrics are logged."""

    model_parts: list[nn.Module]
    """The model, as far as this rank has it: several stages under some pipeline schedules."""


class Hook:
    """What wants to know of a run's moments. Each method does nothing unless a hook says otherwise.

    All ranks are at each moment alike, so that a hook may communicate. An exception ends the run.
    """

    def begin_step(self, moment: Moment) -> None:
        """A step begins: its batches are there, nothing of them is computed."""

    def end_micro_batch(self, moment: Moment) -> None:
        """Forward and backward pass of a micro-batch (under a pipeline, of all of a step's) have been launched."""

    def before_optimizer(self, moment: Moment) -> None:
        """The step's gradients are complete and clipped; no weight has changed yet."""

    def end_step(self, moment: Moment) -> None:
        """The optimizer has stepped, and the step's metrics are logged where they are to be."""

    def saved(self, moment: Moment) -> None:
        """A checkpoint of the step is saved, or is being saved in the background."""

    def close(self, moment: Moment) -> None:
        """The run has ended, well or not."""


def tell(hooks: Iterable[Hook], name: Name, moment: Moment) -> None:
    """Call a moment's method of every hook, in their order."""
    for hook in hooks:
        getattr(hook, name)(moment)
