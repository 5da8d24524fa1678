"""Grouped experts that compute in the dtype of their parameters."""

# Shape suffixes, as in torchtitan.models.common.moe:
#   R = routed tokens of the local experts, D = model dim, F = expert hidden dim, E = experts

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torchtitan.models.common.moe import GroupedExperts


class DtypePreservingGroupedExperts(GroupedExperts):
    """TorchTitan's grouped experts without their cast to bfloat16.

    Upstream (torchtitan/models/common/moe.py) computes in bfloat16 whatever ``mixed_precision_param`` says: about
    5e-3 off in an fp32 run, where a layout's losses are to agree with one device's to 1e-5.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """Apply each expert to its run of rows: (R, D), (E,) -> (R, D)."""
        w1_EFD, w2_EDF, w3_EFD = (
            w.to_local() if isinstance(w, DTensor) else w for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD)
        )
        dtype, x_RD = x_RD.dtype, x_RD.to(w1_EFD.dtype)
        offs = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        h_RF = F.silu(self._grouped_mm(A=x_RD, B_t=w1_EFD.transpose(-2, -1), offs=offs))
        h_RF = h_RF * self._grouped_mm(A=x_RD, B_t=w3_EFD.transpose(-2, -1), offs=offs)
        return self._grouped_mm(A=h_RF, B_t=w2_EDF.transpose(-2, -1), offs=offs).to(dtype)
