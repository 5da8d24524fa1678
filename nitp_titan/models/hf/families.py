"""How stock architectures write in ``config.json`` what they compute: keys, and the defaults of their classes.

The names are those of :mod:`nitp_titan.models.hf.config_json`. Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Computed = dict[str, Any]
"""Name -> value of everything that a decoder's logits depend on, besides its weights."""

NO_EXTRAS: Computed = {"activation": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": 0}
"""Of every decoder here."""

PLAIN_ROUTER: Computed = {"router_scale": 1.0, "router_groups": 1, "router_groups_chosen": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a ``model_type`` writes what it computes."""

    architecture: str
    keys: dict[str, tuple[str, ...]]
    """Name -> the keys that it may stand under."""
    defaults: Computed = field(default_factory=dict)
    fixed: Computed = field(default_factory=dict)
    """What no key changes."""
    theta: float = 10_000.0
    latent: bool = False
    is_dense: Callable[[Mapping[str, Any], int], bool] | None = None
    """Whether a block has no experts; None where none has."""
    dense_key: str = ""
    """The key that says so."""


SIZES: dict[str, tuple[str, ...]] = {
    "n_layers": ("num_hidden_layers",),
    "dim": ("hidden_size",),
    "n_heads": ("num_attention_heads",),
    "vocab_size": ("vocab_size",),
}
COMMON = SIZES | {
    "hidden_dim": ("intermediate_size",),
    "norm_eps": ("rms_norm_eps",),
    "tie_embeddings": ("tie_word_embeddings",),
    "activation": ("hidden_act",),
    "attention_bias": ("attention_bias",),
}
_GROUPED = COMMON | {"n_kv_heads": ("num_key_value_heads",), "head_dim": ("head_dim",)}
_COMMON_DEFAULTS = {"norm_eps": 1e-6, "tie_embeddings": False, "activation": "silu", "attention_bias": False}
_NO_WINDOW = {"sliding_window": 0}
_NO_MLP_BIAS = {"mlp_bias": False}
_DENSE = {"num_experts": 0}


def _ernie_dense(values: Mapping[str, Any], block: int) -> bool:
    end = values.get("moe_layer_end_index", -1)
    after = block < values.get("moe_layer_start_index", 1) or (end != -1 and block > end)
    return after or (block + 1) % values.get("moe_layer_interval", 1) != 0


def _qwen3_dense(values: Mapping[str, Any], block: int) -> bool:
    return block in (values.get("mlp_only_layers") or ()) or (block + 1) % values.get("decoder_sparse_step", 1) != 0


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        keys=_GROUPED | {"mlp_bias": ("mlp_bias",)},
        defaults=_COMMON_DEFAULTS | _NO_MLP_BIAS,
        fixed=_NO_WINDOW | _DENSE,
    ),
    "ernie4_5_moe": Family(
        architecture="Ernie4_5_MoeForCausalLM",
        keys=_GROUPED
        | {
            "attention_bias": ("use_bias",),
            "mlp_bias": ("use_bias",),
            "num_experts": ("moe_num_experts", "num_experts"),
            "top_k": ("moe_k", "num_experts_per_tok"),
            "expert_hidden_dim": ("moe_intermediate_size",),
            "num_shared_experts": ("moe_num_shared_experts",),
        },
        defaults=_COMMON_DEFAULTS
        | _NO_MLP_BIAS
        | {"norm_eps": 1e-5, "tie_embeddings": True, "n_kv_heads": 4}
        | {"num_experts": 64, "top_k": 6, "num_shared_experts": 2},
        fixed=_NO_WINDOW | PLAIN_ROUTER | {"router_score_func": "softmax", "router_norm": True},
        theta=500_000.0,
        is_dense=_ernie_dense,
        dense_key="moe_layer_start_index",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        keys=_GROUPED,
        defaults=_COMMON_DEFAULTS | {"n_kv_heads": 32, "head_dim": 128},
        fixed=_NO_MLP_BIAS | _DENSE,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        keys=_GROUPED
        | {
            "num_experts": ("num_experts", "num_local_experts"),
            "top_k": ("num_experts_per_tok",),
            "expert_hidden_dim": ("moe_intermediate_size",),
            "router_norm": ("norm_topk_prob",),
        },
        defaults=_COMMON_DEFAULTS | {"n_kv_heads": 4, "num_experts": 128, "top_k": 8, "router_norm": False},
        fixed=_NO_MLP_BIAS | PLAIN_ROUTER | {"router_score_func": "softmax", "num_shared_experts": 0},
        is_dense=_qwen3_dense,
        dense_key="mlp_only_layers",
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        keys=COMMON
        | {name: (name,) for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")}
        | {
            "v_head_dim": ("v_head_dim",),
            "rope_interleave": ("rope_interleave",),
            "num_experts": ("n_routed_experts", "num_local_experts"),
            "top_k": ("num_experts_per_tok",),
            "expert_hidden_dim": ("moe_intermediate_size",),
            "num_shared_experts": ("n_shared_experts",),
            "router_norm": ("norm_topk_prob",),
            "router_scale": ("routed_scaling_factor",),
            "router_groups": ("n_group",),
            "router_groups_chosen": ("topk_group",),
        },
        defaults=_COMMON_DEFAULTS
        | {"q_lora_rank": 1536, "rope_interleave": True, "top_k": 8, "num_shared_experts": 1, "router_norm": True}
        | {"router_scale": 2.5, "router_groups": 8, "router_groups_chosen": 4},
        fixed=_NO_MLP_BIAS | _NO_WINDOW | {"router_score_func": "sigmoid"},
        latent=True,
        is_dense=lambda values, block: block < values.get("first_k_dense_replace", 3),
        dense_key="first_k_dense_replace",
    ),
}
