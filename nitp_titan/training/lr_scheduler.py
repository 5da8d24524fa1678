"""Warm-up, stable, decay: TorchTitan's curves and an exponential one (the paper's 45B model), each held at its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torchtitan.components.optimizer import LRSchedulersContainer as Upstream


class LRSchedulersContainer(Upstream):
    """TorchTitan's schedulers, and ``decay_type = "exponential"``; past the schedule's end the last rate stays.

    TorchTitan's curves go on there: the linear and square-root ones below zero, the cosine up again.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Upstream.Config):
        decay_type: Literal["linear", "sqrt", "cosine", "exponential"] = "linear"
        """Curve of the decay. "exponential" falls by a constant factor a step, down to min_lr_factor."""

        def __post_init__(self) -> None:
            if problems := list(self._problems()):
                raise ValueError("; ".join(f"lr_scheduler.{problem}" for problem in problems))

        def _problems(self) -> Iterator[str]:
            """Yield the values with which a rate would lie outside of 0 and its peak."""
            if self.warmup_steps < 0:
                yield f"warmup_steps: found {self.warmup_steps}, expected at least 0"
            if self.total_steps is not None and self.total_steps < 1:
                yield f"total_steps: found {self.total_steps}, expected at least 1"
            if self.decay_ratio is not None and not 0 <= self.decay_ratio <= 1:
                yield f"decay_ratio: found {self.decay_ratio}, expected a number in [0, 1]"
            if not 0 <= self.min_lr_factor <= 1:
                yield f"min_lr_factor: found {self.min_lr_factor}, expected a number in [0, 1]"
            elif self.decay_type == "exponential" and not self.min_lr_factor:
                yield (
                    f"min_lr_factor: found {self.min_lr_factor}, expected a number in (0, 1] "
                    'with decay_type = "exponential", which never reaches 0'
                )

        def build(self, *, optimizers: Any, training_steps: int) -> Upstream:
            """Return the schedulers of the optimizers, as TorchTitan's ``build`` does."""
            exponential = self.decay_type == "exponential"
            # The linear curve falls from 1 to 0 while the decay's progress goes from 0 to 1.
            curve = replace(self, decay_type="linear", min_lr_factor=0.0) if exponential else self
            built = Upstream.Config.build(curve, optimizers=optimizers, training_steps=training_steps)
            factor = built.schedulers[0].lr_lambdas[0]
            decay_starts = factor.keywords["warmup_steps"] + factor.keywords["stable_steps"]
            last = training_steps if self.total_steps is None else self.total_steps

            def held(step: int) -> float:
                step = min(step, last)
                if exponential and step >= decay_starts:
                    return self.min_lr_factor ** (1 - factor(step))
                return factor(step)

            return Upstream(optimizers, held)
