"""Which positions of a batch count in the NITP loss, also where context parallelism spreads the sequence."""

# Shape suffixes: B = batch, L = sequence

from __future__ import annotations

import torch

from nitp_titan.nitp.config import NITPConfig
from nitp_titan.nitp.objective import pair_mask


def nitp_shift(nitp: NITPConfig) -> int:
    """The shift that decides which positions count: the generic-cosine baseline has no target, so none."""
    return nitp.shift if nitp.has_target else 0


def counted(nitp: NITPConfig, positions: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """Return which positions of whole sequences count in the NITP loss: (B, L) bool.

    Args:
        positions: (B, L); without them every row is one document, as TorchTitan's attention takes it.
        labels: (B, L).
    """
    if positions is None:
        positions = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)
    return pair_mask(positions, labels, shift=nitp_shift(nitp))
