"""From a flavor's shape to TorchTitan's ``ModelSpec``: the plain backbone, without NITP.

The decoder, its sharding and its parallelization are TorchTitan's Qwen3 ones, which serve any mixture of dense and
MoE blocks with grouped-query attention; the family differs from Qwen3 in having no query and key norms.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from torchtitan.models.qwen3.parallelize import parallelize_qwen3
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.models.experts import DtypePreservingGroupedExperts
from nitp_titan.models.flavors import FLAVORS, Flavor, MoEShape

_STD = 0.02


def _normal(std: float = _STD) -> dict[str, Any]:
    return {"weight": partial(nn.init.normal_, std=std), "bias": nn.init.zeros_}


def _norm(dim: int) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=dim, eps=1e-6, param_init={"weight": nn.init.ones_})


def _moe(flavor: Flavor, shape: MoEShape, residual_init: dict[str, Any]) -> Any:
    routed = make_routed_experts_config(
        dim=flavor.dim,
        hidden_dim=shape.expert_hidden_dim,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        param_init={
            "w1_EFD": _normal()["weight"],
            "w2_EDF": residual_init["weight"],
            "w3_EFD": _normal()["weight"],
        },
        comm_backend="standard",
    )
    experts = routed.inner_experts
    routed.inner_experts = DtypePreservingGroupedExperts.Config(
        dim=experts.dim, hidden_dim=experts.hidden_dim, num_experts=experts.num_experts, param_init=experts.param_init
    )
    shared = make_ffn_config(
        dim=flavor.dim,
        hidden_dim=shape.expert_hidden_dim * shape.num_shared_experts,
        w1_param_init=_normal(),
        w2w3_param_init=_normal(),
    )
    return make_moe_config(
        num_experts=shape.num_experts,
        router=make_router_config(
            dim=flavor.dim,
            num_experts=shape.num_experts,
            gate_param_init=_normal(),
            top_k=shape.top_k,
            score_func="softmax",
            route_norm=True,
        ),
        routed_experts=routed,
        shared_experts=shared if shape.num_shared_experts else None,
    )


def decoder_config(flavor: Flavor, *, attn_backend: str = "flex") -> Qwen3Model.Config:
    """Return the configuration of the decoder with the shape of ``flavor``.

    Weights are normal with standard deviation 0.02, divided by sqrt(2 * n_layers) where a block writes to the
    residual stream (GPT-2's initialization, as in TorchTitan's Qwen3 MoE).
    """
    residual_init = _normal(_STD / (2 * flavor.n_layers) ** 0.5)
    rope = ComplexRoPE.Config(
        dim=flavor.head_dim, max_seq_len=flavor.max_seq_len, theta=flavor.rope_theta, scaling="none"
    )
    layers = []
    for layer_id in range(flavor.n_layers):
        is_moe = flavor.moe is not None and layer_id >= flavor.moe.n_dense_layers
        layers.append(
            Qwen3TransformerBlock.Config(
                attention_norm=_norm(flavor.dim),
                ffn_norm=_norm(flavor.dim),
                attention=make_gqa_config(
                    dim=flavor.dim,
                    n_heads=flavor.n_heads,
                    n_kv_heads=flavor.n_kv_heads,
                    head_dim=flavor.head_dim,
                    wqkv_param_init=_normal(),
                    wo_param_init=residual_init,
                    inner_attention=get_attention_config(attn_backend),
                    fuse_qkv=True,
                    rope=rope,
                ),
                feed_forward=None
                if is_moe
                else make_ffn_config(
                    dim=flavor.dim,
                    hidden_dim=flavor.hidden_dim,
                    w1_param_init=_normal(),
                    w2w3_param_init=residual_init,
                ),
                moe=_moe(flavor, flavor.moe, residual_init) if is_moe else None,
            )
        )
    return Qwen3Model.Config(
        dim=flavor.dim,
        vocab_size=flavor.vocab_size,
        enable_weight_tying=flavor.tie_embeddings,
        tok_embeddings=Embedding.Config(
            num_embeddings=flavor.vocab_size,
            embedding_dim=flavor.dim,
            # A tied embedding is lm_head's weight, which initializes it.
            param_init={"weight": skip_param_init} if flavor.tie_embeddings else {"weight": _normal()["weight"]},
        ),
        norm=_norm(flavor.dim),
        lm_head=Linear.Config(in_features=flavor.dim, out_features=flavor.vocab_size, param_init=_normal()),
        layers=layers,
    )


def model_registry(flavor: str, *, attn_backend: str = "flex") -> ModelSpec:
    """Return the backbone of ``flavor``.

    Raises:
        ValueError: no such flavor; the message lists them.
    """
    if flavor not in FLAVORS:
        raise ValueError(f"unknown flavor {flavor!r}; nitp_titan has {', '.join(FLAVORS)}")
    return ModelSpec(
        name="nitp_titan",
        flavor=flavor,
        model=decoder_config(FLAVORS[flavor], attn_backend=attn_backend),
        parallelize_fn=parallelize_qwen3,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=register_moe_load_balancing_hook,
        state_dict_adapter=None,
    )
