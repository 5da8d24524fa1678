"""What the configuration of a TorchTitan decoder says, in the terms of transformers."""

from __future__ import annotations

from typing import Any

from torchtitan.models.common import FeedForward, MoE, RoPE
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3.model import Attention as LatentAttention

from nitp_titan.models.hf.config_json import leading, rope_facts
from nitp_titan.models.hf.families import Computed


def moe_of(config: Decoder.Config) -> MoE.Config | None:
    """Return the first mixture of experts; None in a dense model."""
    return next((layer.moe for layer in config.layers if layer.moe is not None), None)


def dense_of(config: Decoder.Config) -> FeedForward.Config | None:
    """Return the first dense feed-forward; None where every block has experts."""
    return next((layer.feed_forward for layer in config.layers if layer.feed_forward is not None), None)


def n_dense(config: Decoder.Config) -> int:
    """Return the number of blocks without experts."""
    return sum(layer.moe is None for layer in config.layers)


def experts_of(moe: MoE.Config | None) -> dict[str, Any]:
    """Return what a block with experts computes, in comparable values."""
    assert moe is not None
    shared, hidden = moe.shared_experts, moe.routed_experts.inner_experts.hidden_dim
    router = ("top_k", "score_func", "route_norm", "route_scale", "num_expert_groups", "num_limited_groups")
    return {
        "num_experts": moe.num_experts,
        "hidden_dim": hidden,
        "num_shared": shared.w1.out_features / hidden if shared is not None else 0,
        "gated": shared is not None and type(shared) is not FeedForward.Config,
        "bias": moe.load_balance_coeff is not None,
        **{name: getattr(moe.router, name) for name in router},
    }


def heads_of(config: Decoder.Config, attention: Any) -> dict[str, Any]:
    """Return the keys of ``config.json`` that say the attention's shape."""
    if isinstance(attention, LatentAttention.Config):
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return {
            "num_attention_heads": attention.n_heads,
            "num_key_value_heads": attention.n_heads,
            "q_lora_rank": attention.q_lora_rank or None,
            **{name: getattr(attention, name) for name in names},
        }
    return {
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads or attention.n_heads,
        "head_dim": attention.head_dim or config.dim // attention.n_heads,
    }


def rope_parameters(attention: Any) -> dict[str, Any]:
    """Return the key of that name: the same inverse frequencies, and of latent attention the same softmax scale."""
    rope: RoPE.Config = attention.rope
    theta = {"rope_theta": float(rope.theta)}
    if rope.scaling == "llama":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = {"factor": rope.scaling_factor} | {name: getattr(rope, name) for name in names}
        return {"rope_type": "llama3", **theta, **scaling}
    if rope.scaling == "yarn" and rope.rope_factor > 1:
        scaling = {"factor": rope.rope_factor, "original_max_position_embeddings": rope.original_seq_len}
        scaling |= {name: getattr(rope, name) for name in ("beta_fast", "beta_slow", "truncate")}
        # TorchTitan's rotation keeps lengths: DeepSeek-V3 scales its softmax, which transformers calls "all_dim".
        scaling["attention_factor"] = 1.0
        if isinstance(attention, LatentAttention.Config):
            scaling |= {"mscale": attention.mscale, "mscale_all_dim": attention.mscale}
        return {"rope_type": "yarn", **theta, **scaling}
    return {"rope_type": "default", **theta}


def computed_by(config: Decoder.Config, architecture: str) -> Computed:
    """Return what a decoder computes, under the names of :mod:`nitp_titan.models.hf.config_json`.

    Args:
        config: a decoder whose blocks are alike, as the stock architectures' are.
        architecture: the stock architecture that its weights have the names of.
    """
    attention, dense, moe = config.layers[0].attention, dense_of(config), moe_of(config)
    latent = isinstance(attention, LatentAttention.Config)
    heads = heads_of(config, attention)
    renamed = {"num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads"}
    if latent:
        del heads["num_key_value_heads"]
        heads |= {"q_lora_rank": attention.q_lora_rank, "rope_interleave": True}
    computed: Computed = {
        "architecture": architecture,
        "n_layers": len(config.layers),
        "dim": config.dim,
        **{renamed.get(key, key): value for key, value in heads.items()},
        **({"hidden_dim": dense.w1.out_features} if dense is not None else {}),
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm.eps,
        "tie_embeddings": config.enable_weight_tying,
        "activation": "silu",
        "attention_bias": attention.wo.bias,
        "mlp_bias": dense is not None and dense.w1.bias,
        "sliding_window": 0,
        **rope_facts(rope_parameters(attention), latent=latent),
        "num_experts": 0,
    }
    if moe is None:
        return computed
    experts = experts_of(moe)
    return computed | {
        "num_experts": experts["num_experts"],
        "top_k": experts["top_k"],
        "expert_hidden_dim": experts["hidden_dim"],
        "num_shared_experts": experts["num_shared"],
        "n_dense_layers": leading(i for i, layer in enumerate(config.layers) if layer.moe is None),
        "router_score_func": experts["score_func"],
        "router_norm": experts["route_norm"],
        "router_scale": experts["route_scale"],
        "router_groups": experts["num_expert_groups"] or 1,
        "router_groups_chosen": experts["num_limited_groups"] or 1,
    }
