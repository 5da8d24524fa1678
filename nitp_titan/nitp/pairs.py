"""Which positions of a batch count in the NITP loss."""

# Shape suffixes: B = batch, L = sequence

from __future__ import annotations

import torch

from nitp_titan.nitp.config import NITPConfig
from nitp_titan.nitp.objective import pair_mask


def counted(nitp: NITPConfig, positions: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """Return which positions of whole sequences count in the NITP loss: (B, L) bool.

    Args:
        positions: (B, L); without them every row is one document, as TorchTitan's attention takes it.
        labels: (B, L).
    """
    if positions is None:
        positions = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)
    # A regulariser has no target, and so no next token that must be there.
    return pair_mask(positions, labels, shift=nitp.shift if nitp.has_target else 0)
