"""Routed experts whose grouped products are float8, rowwise: by torchao's kernels, or emulated."""

# Shape suffixes: R = routed tokens of the local experts, E = experts; K, N = any

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_utils import amax_to_scale, tensor_to_scale, to_fp8_saturated
from torchao.prototype.moe_training.config import Float8TrainingOpConfig
from torchao.prototype.moe_training.utils import _quantize_then_scaled_grouped_mm
from torchtitan.components.quantization import float8 as upstream
from torchtitan.models.common.moe import GroupedExperts

from nitp_titan.models.experts import grouped_mm, grouped_mm_weight_grad
from nitp_titan.titan.retyped import retyped


def float8_experts_config(experts: GroupedExperts.Config, *, emulate: bool) -> GroupedExperts.Config:
    """Return the configuration of the experts' float8 twin; parameters, their names and sharding stay.

    TorchTitan's own converter wraps the parameters in a tensor class of torchao's, which then stands in checkpoints
    and does not see the products of experts in their parameters' dtype. Here the product itself is overridden.
    """
    return retyped(experts, _float8_experts_class(type(experts)._owner, emulate).Config)


@functools.cache
def _float8_experts_class(base: type[GroupedExperts], emulate: bool) -> Any:
    op_config = Float8TrainingOpConfig()

    class Float8Experts(base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            pass

        def _grouped_mm(self, *, A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
            if emulate:
                return EmulatedGroupedMM.apply(A, B_t, offs)
            # The kernels' results are bf16.
            return _quantize_then_scaled_grouped_mm(A, B_t, config=op_config, offs=offs).to(A.dtype)

    Float8Experts.__name__ = Float8Experts.__qualname__ = f"Float8[{base.__name__}]"
    # Where TorchTitan looks for quantized experts, whose run has no MFU against bf16 peaks.
    upstream._float8_experts_cache[Float8Experts] = Float8Experts
    return Float8Experts


class EmulatedGroupedMM(torch.autograd.Function):
    """torchao's rowwise float8 grouped product (torchao/prototype/moe_training/fp8_grouped_mm.py), in fp32.

    (R, K), (E, K, N), (E,) -> (R, N). Each operand of each product is rounded to float8 with a scale for each of its
    rows, or columns, that the product adds up along; in the weights' gradient for those of each expert. Scales are
    powers of two.
    """

    @staticmethod
    def forward(ctx: Any, a_RK: torch.Tensor, b_EKN: torch.Tensor, offs_E: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a_RK, b_EKN, offs_E)
        return grouped_mm(_rounded(a_RK, -1), _rounded(b_EKN, -2), offs_E).to(a_RK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_RN: torch.Tensor) -> Any:
        a_RK, b_EKN, offs_E = ctx.saved_tensors
        b_ENK = b_EKN.transpose(-2, -1)
        a_grad_RK = grouped_mm(_rounded(grad_RN, -1), _rounded(b_ENK, -2), offs_E)
        b_grad_EKN = grouped_mm_weight_grad(
            _rounded_by_expert(a_RK, offs_E), _rounded_by_expert(grad_RN, offs_E), offs_E
        )
        return a_grad_RK.to(a_RK.dtype), b_grad_EKN.to(b_EKN.dtype), None


_FLOAT8 = torch.float8_e4m3fn


def _rounded(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Round to float8 and back to fp32, with a scale for each slice along ``dim``."""
    scale = tensor_to_scale(
        x,
        _FLOAT8,
        scaling_granularity=ScalingGranularity.AXISWISE,
        axiswise_dim=dim,
        round_scales_to_power_of_2=True,
    )
    return to_fp8_saturated(x.float() * scale, _FLOAT8).float() / scale


def _rounded_by_expert(x_RK: torch.Tensor, offs_E: torch.Tensor) -> torch.Tensor:
    """Round to float8 and back to fp32, with a scale for each column of each expert's rows."""
    rows_R = torch.arange(x_RK.shape[0], dtype=offs_E.dtype, device=x_RK.device)
    # Row r belongs to the first expert e with r < offs[e]; rows behind the last are nobody's.
    expert_RK = torch.searchsorted(offs_E, rows_R, right=True).unsqueeze(1).expand(x_RK.shape)
    amax = x_RK.new_zeros(offs_E.shape[0] + 1, x_RK.shape[1])
    amax = amax.scatter_reduce(0, expert_RK, x_RK.abs(), "amax")
    scale_RK = amax_to_scale(amax, _FLOAT8, round_scales_to_power_of_2=True).gather(0, expert_RK)
    return to_fp8_saturated(x_RK.float() * scale_RK, _FLOAT8).float() / scale_RK
