"""Tensors that FSDP or tensor parallelism may have spread over ranks, as this rank's plain ones."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement


def local(x: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a tensor; of a plain one, itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def local_as(x: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Return what this rank has of a tensor in a placement, on every axis of its mesh. Differentiable."""
    if not isinstance(x, DTensor):
        return x
    placements = [placement] * x.device_mesh.ndim
    return x.redistribute(placements=placements).to_local(grad_placements=placements)
