"""The gradient of a linear map's weight over several chunks of rows, added up in fp32 by the products that make it.

Of a vocabulary it is as large as the logits of a thousand tokens and more: a pass over it for every chunk would be
felt. A gradient in bfloat16 that is then added to a sum in fp32 moves 12 bytes a weight, most of them in that pass; a
product that adds to its output moves 8, and computes meanwhile.
"""

# Shape suffixes: S = shards of the sequence (1 without), C = rows of a chunk, R = S * C, D = model dim,
# V = outputs of the map (the vocabulary)

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Replicate, Shard

from nitp_titan.nitp.dtensors import local


class WeightGradient:
    """A map ``h -> h @ weight.T`` whose backward pass adds the weight's gradient to ``total``, and returns none.

    ``total`` is this rank's part, laid out as the weight is; None before the first backward pass. It has the weight's
    dtype if there is one chunk, else at least fp32.
    """

    def __init__(self, weight_VD: torch.Tensor, *, chunks: int):
        self.weight_VD = weight_VD
        self.total: torch.Tensor | None = None
        dtype = weight_VD.dtype
        self._dtype = dtype if chunks == 1 else torch.promote_types(dtype, torch.float32)

    def linear(self, h_SCD: torch.Tensor) -> torch.Tensor:
        """Map rows (S, C, D) to (S, C, V). Differentiable by them, once."""
        return _Linear.apply(h_SCD, self.weight_VD, self)

    def add(self, grad_SCV: torch.Tensor, h_SCD: torch.Tensor) -> None:
        """Add what a chunk's outputs' gradient and its rows give.

        Tensor parallelism may spread the outputs, and the weight with them, over V; rows are whole on every rank.
        """
        for x, layouts in ((grad_SCV, (Shard(2), Replicate())), (h_SCD, (Replicate(),))):
            assert not isinstance(x, DTensor) or all(p in layouts for p in x.placements), f"products of {x.placements}"
        grad_VR, h_RD = local(grad_SCV).flatten(0, 1).T, local(h_SCD).flatten(0, 1)
        if self._dtype == grad_VR.dtype:
            self.total = grad_VR @ h_RD if self.total is None else self.total.addmm_(grad_VR, h_RD)
        elif not adds_products_in_fp32(grad_VR.device):
            product_VD = grad_VR @ h_RD
            self.total = product_VD.to(self._dtype) if self.total is None else self.total.add_(product_VD)
        elif self.total is None:
            self.total = torch.mm(grad_VR, h_RD, out_dtype=self._dtype)
        else:
            torch.addmm(self.total, grad_VR, h_RD, out_dtype=self._dtype, out=self.total)


def adds_products_in_fp32(device: torch.device) -> bool:
    """Whether torch can make a product of bfloat16, and add it to a sum, in fp32 (``out_dtype``): on CUDA alone."""
    return device.type == "cuda" and torch.version.hip is None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_SCD: torch.Tensor, weight_VD: torch.Tensor, gradient: WeightGradient) -> torch.Tensor:
        ctx.save_for_backward(h_SCD, weight_VD)
        ctx.gradient = gradient
        return F.linear(h_SCD, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad_SCV: torch.Tensor) -> Any:
        h_SCD, weight_VD = ctx.saved_tensors
        if weight_VD.requires_grad:
            ctx.gradient.add(grad_SCV, h_SCD)
        return grad_SCV @ weight_VD, None, None
