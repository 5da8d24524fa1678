"""Waiting for a collective that is under way, without losing the gradient of what comes out of it."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor, wait_tensor

from nitp_titan.runtime.shims.shim import Shim


class _Wait(torch.autograd.Function):
    """The tensor of a collective that is over; its gradient is the waiting tensor's."""

    @staticmethod
    def forward(ctx: Any, waiting: AsyncCollectiveTensor) -> torch.Tensor:
        # A new tensor over the same memory: autograd writes into what is returned here, and the wrapper keeps its own.
        return wait_tensor(waiting.elem).detach()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        return grad_output


def wait(self: AsyncCollectiveTensor) -> torch.Tensor:
    """``AsyncCollectiveTensor.wait`` that autograd follows: return the plain tensor, once its collective is over.

    On a GPU the current stream waits, as with torch's own: whoever is given the result reads what was gathered.
    """
    if torch.is_grad_enabled() and self.requires_grad:
        return _Wait.apply(self)
    return wait_tensor(self.elem)


def loses_gradients() -> bool:
    """Whether this torch's ``AsyncCollectiveTensor.wait`` returns a constant."""
    # Of no collective, so that there is nothing to wait for. A view, as to_local makes one: it is autograd's own.
    waiting = AsyncCollectiveTensor(torch.zeros(1)).requires_grad_().view(1)
    return not waiting.wait().requires_grad


def _patch() -> None:
    AsyncCollectiveTensor.wait = wait


SHIMS = [
    Shim(
        target="torch.distributed._functional_collectives.AsyncCollectiveTensor.wait",
        reason="it is a constant for autograd, and local_map waits with it for what TorchTitan gathers asynchronously: "
        "under tensor parallelism without expert parallelism routed experts pass no gradient on to router, norm and "
        "the blocks below where a micro-batch is one sequence (several are joined by a cat, which waits rightly)",
        until="a torch whose wait() autograd follows: 2.11 to 2.15 have none, and the shim looks",
        applies=loses_gradients,
        apply=_patch,
    ),
]
