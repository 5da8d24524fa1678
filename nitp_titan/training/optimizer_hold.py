"""Optimizers whose step does nothing where a flag on the device says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer.utils import init_optim_state
from torchtitan.tools.logging import logger


class OptimizerHold:
    """Holds a run's optimizers back for a step: weights, moments and step counts stay, bit for bit.

    A fused optimizer reads the flag on the device, as it does for torch's gradient scaler. Of any other, and of one
    whose weights are offloaded to the CPU, the host reads it and leaves the step out: free on a CPU; a GPU's host
    waits for the device once a step.
    """

    def __init__(self, optimizers: OptimizersContainer, device: torch.device):
        self._flag = torch.zeros((), dtype=torch.float32, device=device)
        self._held = False
        self._reading: list[Optimizer] = []
        self._asked: list[Optimizer] = []
        for optimizer in optimizers:
            on_device = all(p.device.type == device.type for group in optimizer.param_groups for p in group["params"])
            # Not torch's own mark of these, which an optimizer whose groups alone say "fused" does not have.
            fused = isinstance(optimizer, Adam | AdamW) and all(group.get("fused") for group in optimizer.param_groups)
            reads = fused and on_device
            (self._reading if reads else self._asked).append(optimizer)
        for optimizer in self._asked:
            self._let_host_hold(optimizer)
        if self._asked and device.type != "cpu":
            logger.info(
                "Each step waits for the device, which says whether its numbers are finite: "
                'optimizer.implementation = "fused" and weights on the device would spare it'
            )

    def _let_host_hold(self, optimizer: Optimizer) -> None:
        step = optimizer.step

        def step_unless_held(*args: Any, **kwargs: Any) -> Any:
            return None if self._held else step(*args, **kwargs)

        # The schedulers count on being the ones that called it.
        step_unless_held.__dict__.update(getattr(step, "__dict__", {}))
        optimizer.step = step_unless_held  # pyrefly: ignore[bad-assignment]

    def where(self, skipped: Tensor) -> None:
        """Hold the optimizers back until :meth:`release`, where ``skipped`` (0-d) is not 0."""
        self._flag.copy_(skipped)
        for optimizer in self._reading:
            optimizer.found_inf = self._flag  # pyrefly: ignore[missing-attribute]
        self._held = bool(self._asked) and bool(self._flag.item())

    def release(self) -> None:
        """End the hold: a step from here on is one."""
        self._held = False
        for optimizer in self._reading:
            if hasattr(optimizer, "found_inf"):
                del optimizer.found_inf

    def make_state(self) -> None:
        """Give optimizers that have never stepped the state that a checkpoint is to hold: no moments, no steps.

        TorchTitan makes none beside gradients, and a step that was left out has some.
        """
        for optimizer in self._asked:
            if optimizer.state:
                continue
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            gradients = [p.grad for p in parameters]
            for parameter in parameters:
                parameter.grad = None
            init_optim_state(optimizer)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for state in optimizer.state.values():
                if isinstance(steps := state.get("step"), Tensor):
                    steps.zero_()
