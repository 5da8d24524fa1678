"""A mask of whole sequences, cut as context parallelism cuts tokens."""

from __future__ import annotations

import torch
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import cp_shard


def context_shard(mask_BL: torch.Tensor, parallel_dims: ParallelDims, parallelism: ParallelismConfig) -> torch.Tensor:
    """Return this context rank's part of a mask, in the order in which TorchTitan shards tokens and labels.

    The mask of whole sequences is cut, and not made from cut ones: a shard cannot see whether its last token's
    successor is of the same document.
    """
    if not parallel_dims.cp_enabled:
        return mask_BL
    mesh = parallel_dims.get_mesh("cp")
    (mask_BL,), _ = cp_shard(mesh, (mask_BL,), None, parallelism.context_parallel_load_balancer)
    return mask_BL
