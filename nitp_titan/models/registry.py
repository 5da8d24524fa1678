"""From a flavor's shape to TorchTitan's ``ModelSpec``: the plain backbone, without NITP.

The decoder, its sharding and its parallelization are TorchTitan's Qwen3 ones, which serve any mixture of dense and
MoE blocks with grouped-query attention; the family differs from Qwen3 in having no query and key norms.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from torch import nn
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from torchtitan.models.qwen3.parallelize import parallelize_qwen3
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import Module

from nitp_titan.models.ernie import ErnieStateDictAdapter
from nitp_titan.models.experts import DtypePreservingGroupedExperts
from nitp_titan.models.flavors import FLAVORS, Shape
from nitp_titan.models.flex_options import default_options
from nitp_titan.models.rope import InterleavedRoPE


def _normal(std: float) -> dict[str, Any]:
    return {"weight": partial(nn.init.normal_, std=std), "bias": nn.init.zeros_}


def _norm(shape: Shape) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=shape.dim, eps=shape.norm_eps, param_init={"weight": nn.init.ones_})


def _moe(shape: Shape, init: dict[str, Any], residual_init: dict[str, Any]) -> MoE.Config:
    routed = make_routed_experts_config(
        dim=shape.dim,
        hidden_dim=shape.expert_hidden_dim,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        param_init={"w1_EFD": init["weight"], "w2_EDF": residual_init["weight"], "w3_EFD": init["weight"]},
        comm_backend="standard",
    )
    experts = routed.inner_experts
    routed.inner_experts = DtypePreservingGroupedExperts.Config(
        dim=experts.dim, hidden_dim=experts.hidden_dim, num_experts=experts.num_experts, param_init=experts.param_init
    )
    shared = None
    if shape.num_shared_experts:
        # Several shared experts are one wide one.
        shared = make_ffn_config(
            dim=shape.dim,
            hidden_dim=shape.expert_hidden_dim * shape.num_shared_experts,
            w1_param_init=init,
            w2w3_param_init=residual_init,
        )
    return make_moe_config(
        num_experts=shape.num_experts,
        router=make_router_config(
            dim=shape.dim,
            num_experts=shape.num_experts,
            gate_param_init=init,
            top_k=shape.top_k,
            score_func=shape.router_score_func,
            route_norm=shape.router_norm,
        ),
        routed_experts=routed,
        shared_experts=shared,
        load_balance_coeff=shape.load_balance_coeff,
    )


def _inner_attention(attn_backend: str, head_dim: int) -> Module.Config:
    config = get_attention_config(attn_backend)
    if attn_backend == "flex":
        assert isinstance(config, FlexAttention.Config)
        config.kernel_options = default_options(head_dim)
    return config


def decoder_config(shape: Shape, *, attn_backend: str = "flex") -> Qwen3Model.Config:
    """Return the configuration of the decoder with this shape.

    Weights are normal with standard deviation ``init_std``, divided by sqrt(2 * n_layers) where a block writes to the
    residual stream (GPT-2's initialization, as in TorchTitan's Qwen3 MoE).
    """
    init, residual_init = _normal(shape.init_std), _normal(shape.init_std / (2 * shape.n_layers) ** 0.5)
    rope = InterleavedRoPE.Config(dim=shape.head_dim, max_seq_len=shape.max_seq_len, theta=shape.rope_theta)
    layers = []
    for layer_id in range(shape.n_layers):
        is_moe = shape.num_experts > 0 and layer_id >= shape.n_dense_layers
        layers.append(
            Qwen3TransformerBlock.Config(
                attention_norm=_norm(shape),
                ffn_norm=_norm(shape),
                attention=make_gqa_config(
                    dim=shape.dim,
                    n_heads=shape.n_heads,
                    n_kv_heads=shape.n_kv_heads,
                    head_dim=shape.head_dim,
                    wqkv_param_init=init,
                    wo_param_init=residual_init,
                    inner_attention=_inner_attention(attn_backend, shape.head_dim),
                    fuse_qkv=True,
                    rope=rope,
                ),
                feed_forward=None
                if is_moe
                else make_ffn_config(
                    dim=shape.dim,
                    hidden_dim=shape.hidden_dim,
                    w1_param_init=init,
                    w2w3_param_init=residual_init,
                ),
                moe=_moe(shape, init, residual_init) if is_moe else None,
            )
        )
    return Qwen3Model.Config(
        dim=shape.dim,
        vocab_size=shape.vocab_size,
        enable_weight_tying=shape.tie_embeddings,
        tok_embeddings=Embedding.Config(
            num_embeddings=shape.vocab_size,
            embedding_dim=shape.dim,
            # A tied embedding is lm_head's weight, which initializes it.
            param_init={"weight": skip_param_init if shape.tie_embeddings else init["weight"]},
        ),
        norm=_norm(shape),
        lm_head=Linear.Config(in_features=shape.dim, out_features=shape.vocab_size, param_init=init),
        layers=layers,
    )


def model_registry(flavor: str, *, attn_backend: str = "flex", **shape: Any) -> ModelSpec:
    """Return the backbone of ``flavor``.

    Args:
        flavor: a name of ``FLAVORS``.
        attn_backend: "flex", "flex_flash" or "varlen".
        shape: fields of :class:`Shape` that differ from the flavor's.

    Raises:
        ValueError: no such flavor (the message lists them), or a shape that contradicts itself.
    """
    if flavor not in FLAVORS:
        raise ValueError(f"unknown flavor {flavor!r}; nitp_titan has {', '.join(FLAVORS)}")
    changed = dataclasses.replace(FLAVORS[flavor].shape, **shape)
    if problems := [f"{key}: {message}" for key, message in changed.problems()]:
        raise ValueError(f"flavor {flavor}: " + "; ".join(problems))
    return ModelSpec(
        name="nitp_titan",
        flavor=flavor,
        model=decoder_config(changed, attn_backend=attn_backend),
        parallelize_fn=parallelize_qwen3,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=register_moe_load_balancing_hook,
        state_dict_adapter=ErnieStateDictAdapter if changed.num_experts else Llama3StateDictAdapter,
    )
