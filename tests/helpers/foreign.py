"""Somebody else's models: TorchTitan's debug models with what else stock architectures have."""

from __future__ import annotations

import dataclasses

from torch import nn
from torchtitan.models import deepseek_v3, qwen3
from torchtitan.models.common.config_utils import make_ffn_config
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.models.experts import DtypePreservingGroupedExperts

_INIT = {"weight": nn.init.zeros_}


def model_registry(flavor: str, attn_backend: str = "flex") -> ModelSpec:
    """Three blocks, with experts that compute in fp32.

    Args:
        flavor: "deepseek_v3" with DeepSeek-V3's router (sigmoid, groups, a scale), or "qwen3_moe" with a dense block.
    """
    if flavor == "deepseek_v3":
        spec = deepseek_v3.model_registry("debugmodel", attn_backend=attn_backend)
    else:
        spec = {"qwen3_moe": qwen3}[flavor].model_registry("debugmodel_moe", attn_backend=attn_backend)
        dense = make_ffn_config(dim=spec.model.dim, hidden_dim=96, w1_param_init=_INIT, w2w3_param_init=_INIT)
        spec.model.layers[1] = dataclasses.replace(spec.model.layers[1], moe=None, feed_forward=dense)
    spec.model.layers = spec.model.layers[:3]
    for layer in spec.model.layers:
        if layer.moe is None:
            continue
        experts = layer.moe.routed_experts.inner_experts
        values = {name: getattr(experts, name) for name in ("dim", "hidden_dim", "num_experts", "param_init")}
        layer.moe.routed_experts.inner_experts = DtypePreservingGroupedExperts.Config(**values)
        if flavor == "deepseek_v3":
            groups = {"num_expert_groups": 2, "num_limited_groups": 1, "route_scale": 2.5}
            layer.moe.router = dataclasses.replace(layer.moe.router, score_func="sigmoid", route_norm=True, **groups)
    return spec
