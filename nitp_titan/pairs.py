"""Which positions of a batch count in the NITP loss, also where context parallelism spreads the sequence."""

# Shape suffixes: B = batch, L = sequence

from __future__ import annotations

import torch
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import cp_shard

from nitp_titan.nitp_config import NITPConfig
from nitp_titan.objective import pair_mask


def nitp_shift(nitp: NITPConfig) -> int:
    """The shift that decides which positions count: the generic-cosine baseline has no target, so none."""
    return 0 if nitp.loss == "generic_cosine" else nitp.shift


def counted(nitp: NITPConfig, positions: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """Return which positions of whole sequences count in the NITP loss: (B, L) bool.

    Args:
        positions: (B, L); without them every row is one document, as TorchTitan's attention takes it.
        labels: (B, L).
    """
    if positions is None:
        positions = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)
    return pair_mask(positions, labels, shift=nitp_shift(nitp))


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
