"""Grouped experts that compute in the dtype of their parameters."""

# Shape suffixes, as in torchtitan.models.common.moe:
#   R = routed tokens of the local experts, D = model dim, F = expert hidden dim, E = experts; K, N = any

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.models.common.moe import GroupedExperts

from nitp_titan.nitp.dtensors import local


@torch.library.custom_op("nitp_titan::grouped_mm", mutates_args=())
def grouped_mm(a_RK: torch.Tensor, b_EKN: torch.Tensor, offs_E: torch.Tensor) -> torch.Tensor:
    """``torch._grouped_mm`` for any dtype under ``torch.compile``, whose shape function of it takes bfloat16 alone.

    (R, K), (E, K, N), (E,) -> (R, N): row r is multiplied with the matrix of the first expert e with r < offs[e].
    """
    return torch._grouped_mm(a_RK, b_EKN, offs=offs_E)


@grouped_mm.register_fake
def _(a_RK: torch.Tensor, b_EKN: torch.Tensor, offs_E: torch.Tensor) -> torch.Tensor:
    return a_RK.new_empty(a_RK.shape[0], b_EKN.shape[-1])


@torch.library.custom_op("nitp_titan::grouped_mm_weight_grad", mutates_args=())
def grouped_mm_weight_grad(a_RK: torch.Tensor, grad_RN: torch.Tensor, offs_E: torch.Tensor) -> torch.Tensor:
    """(R, K), (R, N), (E,) -> (E, K, N): each expert's rows of ``a`` transposed times those of ``grad``."""
    return torch._grouped_mm(a_RK.transpose(0, 1), grad_RN, offs=offs_E)


@grouped_mm_weight_grad.register_fake
def _(a_RK: torch.Tensor, grad_RN: torch.Tensor, offs_E: torch.Tensor) -> torch.Tensor:
    return a_RK.new_empty(offs_E.shape[0], a_RK.shape[1], grad_RN.shape[1])


def _keep_inputs(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    a_RK, b_EKN, offs_E = ctx.saved_tensors
    grad_RN = grad_RN.contiguous()
    return (
        grouped_mm(grad_RN, b_EKN.transpose(-2, -1), offs_E),
        grouped_mm_weight_grad(a_RK, grad_RN, offs_E),
        None,
    )


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_keep_inputs)


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
        w1_EFD, w2_EDF, w3_EFD = (local(w) for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        dtype, x_RD = x_RD.dtype, x_RD.to(w1_EFD.dtype)
        offs = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        h_RF = F.silu(self._grouped_mm(A=x_RD, B_t=w1_EFD.transpose(-2, -1), offs=offs))
        h_RF = h_RF * self._grouped_mm(A=x_RD, B_t=w3_EFD.transpose(-2, -1), offs=offs)
        return self._grouped_mm(A=h_RF, B_t=w2_EDF.transpose(-2, -1), offs=offs).to(dtype)

    def _grouped_mm(self, *, A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        if A.dtype == torch.bfloat16:
            return super()._grouped_mm(A=A, B_t=B_t, offs=offs)
        return grouped_mm(A, B_t, offs)
