"""Document-causal attention on a CPU: flex attention's mask, dense, under scaled-dot-product attention.

Flex attention has no CPU backward. Its mask function is evaluated to a dense (B, 1, Lq, Lk) boolean mask
instead of a BlockMask, and the same products are taken. Sizes are those of debug models: the mask is B * L * L bytes.
"""

# Shape suffixes, as in torchtitan.models.common.attention:
#   B = batch, L = sequence, N = heads, H = head dimension (Lq, Lk where queries and keys differ)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask

from nitp_titan.runtime.cpu_device import on_cpu
from nitp_titan.runtime.shim import Shim


def dense_attention_mask(mask_mod: Callable, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int, **options: Any):
    """Take ``create_block_mask``'s arguments; return the (B, 1, Lq, Lk) boolean mask, True where a query may look."""
    return create_mask(mask_mod, B, H, Q_LEN, KV_LEN, device=options.get("device", "cpu"))


def masked_attention(
    self: torch.nn.Module,
    q_BLNH: torch.Tensor,
    k_BLNH: torch.Tensor,
    v_BLNH: torch.Tensor,
    *,
    attention_masks: torch.Tensor,
    score_mod: Callable | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    out_transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """``FlexAttention.forward`` with a dense mask; ``out_transform`` gets the log-sum-exp of the scores, as there."""
    if score_mod is not None:
        raise NotImplementedError("attention on a CPU takes no score_mod")
    q_BNLH, k_BNLH, v_BNLH = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
    if out_transform is None:
        out_BNLH = F.scaled_dot_product_attention(
            q_BNLH, k_BNLH, v_BNLH, attn_mask=attention_masks, scale=scale, enable_gqa=enable_gqa
        )
        return out_BNLH.transpose(1, 2)

    groups = q_BNLH.shape[1] // k_BNLH.shape[1]
    k_BNLH, v_BNLH = (x.repeat_interleave(groups, dim=1) for x in (k_BNLH, v_BNLH))
    scale = q_BNLH.shape[-1] ** -0.5 if scale is None else scale
    scores_BNLL = (q_BNLH @ k_BNLH.transpose(-1, -2) * scale).masked_fill(~attention_masks, float("-inf")).float()
    out_BNLH = (scores_BNLL.softmax(dim=-1)).to(v_BNLH.dtype) @ v_BNLH
    return out_transform(out_BNLH.transpose(1, 2), scores_BNLL.logsumexp(dim=-1).transpose(1, 2))


def _patch_attention() -> None:
    from torchtitan.models.common import attention, decoder

    attention.create_attention_mask = decoder.create_attention_mask = dense_attention_mask
    attention.FlexAttention.forward = masked_attention


SHIMS = [
    Shim(
        target="torchtitan.models.common.attention.FlexAttention.forward, create_attention_mask",
        reason="flex attention has no backward on a CPU",
        until="torch has one",
        applies=on_cpu,
        apply=_patch_attention,
    ),
]
