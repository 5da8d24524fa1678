"""What an NITP decoder gets beside tokens, cut as context parallelism cuts these."""

from __future__ import annotations

from typing import Any

import torch
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import cp_shard

from nitp_titan.nitp.config import NITPConfig
from nitp_titan.nitp.pairs import counted


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


def loss_inputs(
    nitp: NITPConfig,
    positions: torch.Tensor | None,
    whole_labels: torch.Tensor,
    labels: torch.Tensor,
    parallel_dims: ParallelDims,
    parallelism: ParallelismConfig,
) -> dict[str, Any]:
    """Return what an NITP decoder takes its losses with: this rank's labels, and where NITP counts.

    Args:
        positions: (B, L) of whole sequences, or None.
        whole_labels: (B, L).
        labels: this context rank's part of them.
    """
    return {
        "labels": labels,
        "pairs": context_shard(counted(nitp, positions, whole_labels), parallel_dims, parallelism),
    }
