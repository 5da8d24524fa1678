"""Warm-up, stable, decay with one more curve of the decay: exponential (the paper's 45B model)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torchtitan.components.optimizer import LRSchedulersContainer as Upstream


class LRSchedulersContainer(Upstream):
    """TorchTitan's schedulers, and ``decay_type = "exponential"``."""

    @dataclass(kw_only=True, slots=True)
    class Config(Upstream.Config):
        decay_type: Literal["linear", "sqrt", "cosine", "exponential"] = "linear"  # pyrefly: ignore [bad-override]
        """Curve of the decay. "exponential" falls by a constant factor a step, down to min_lr_factor."""

        def __post_init__(self) -> None:
            if self.decay_type == "exponential" and not 0 < self.min_lr_factor <= 1:
                raise ValueError(
                    f"lr_scheduler.min_lr_factor: found {self.min_lr_factor}, expected a number in (0, 1] "
                    'with decay_type = "exponential", which never reaches 0'
                )

        def build(self, *, optimizers: Any, training_steps: int) -> Upstream:
            """Return the schedulers of the optimizers, as TorchTitan's ``build`` does."""
            if self.decay_type != "exponential":
                return Upstream.Config.build(self, optimizers=optimizers, training_steps=training_steps)
            linear = replace(self, decay_type="linear", min_lr_factor=0.0)
            built = Upstream.Config.build(linear, optimizers=optimizers, training_steps=training_steps)
            factor = built.schedulers[0].lr_lambdas[0]  # pyrefly: ignore [missing-attribute]
            decay_starts = factor.keywords["warmup_steps"] + factor.keywords["stable_steps"]

            def exponential(step: int) -> float:
                # The linear curve falls from 1 to 0 while the decay's progress goes from 0 to 1.
                return factor(step) if step < decay_starts else self.min_lr_factor ** (1 - factor(step))

            return Upstream(optimizers, exponential)
