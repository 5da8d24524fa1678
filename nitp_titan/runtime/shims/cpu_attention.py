"""Document-causal attention on a CPU: flex attention's mask, dense, under scaled-dot-product attention.

Flex attention has no CPU backward. Its mask function is evaluated to a dense (B, 1, Lq, Lk) boolean mask
instead of a BlockMask, and the same products are taken. Sizes are those of debug models: the mask is B * L * L bytes.
"""

# Shape suffixes, as in torchtitan.models.common.attention:
#   B = batch, L = sequence, N = heads, H = head dimension (Lq, Lk where queries and keys differ)

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask

from nitp_titan.runtime.shims.cpu_device import on_cpu
from nitp_titan.runtime.shims.shim import Shim


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


def dense_cp_shard(
    cp_shard: Callable,
    cp_mesh: Any,
    inputs: tuple[torch.Tensor, ...],
    attention_masks: Any,
    load_balancer_type: str | None = "headtail",
    **options: Any,
) -> tuple[tuple[torch.Tensor, ...], Any]:
    """TorchTitan's ``cp_shard``, with dense masks (B, 1, L, L) too: a rank's queries against all keys.

    Context-parallel attention gathers the keys from the ranks: they come in the balancer's order.
    """
    if not isinstance(attention_masks, torch.Tensor):
        return cp_shard(cp_mesh, inputs, attention_masks, load_balancer_type, **options)
    if load_balancer_type == "ptrr":
        raise ValueError('context_parallel_load_balancer: found "ptrr", expected "headtail" or "none" on a CPU')
    mask_BLL = attention_masks.squeeze(1)
    if load_balancer_type == "headtail":
        from torch.distributed.tensor.experimental._attention import _HeadTailLoadBalancer

        order_L = _HeadTailLoadBalancer(mask_BLL.shape[-1], cp_mesh.size(), "cpu")._generate_indices()[0]
        mask_BLL = mask_BLL[:, :, order_L]
    (*shards, mask_BLL), _ = cp_shard(cp_mesh, (*inputs, mask_BLL), None, load_balancer_type, **options)
    return tuple(shards), mask_BLL.unsqueeze(1)


def _patch_context_parallel() -> None:
    import torchtitan.distributed.context_parallel.api as api

    api.cp_shard = partial(dense_cp_shard, api.cp_shard)


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
    Shim(
        target="torchtitan.distributed.context_parallel.api.cp_shard",
        reason="it shards BlockMasks alone, and attention on a CPU has a dense mask",
        until="flex attention has a backward on a CPU",
        applies=on_cpu,
        apply=_patch_context_parallel,
    ),
]
