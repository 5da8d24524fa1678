"""Which stock Hugging Face architecture a decoder is, and how its configuration and tensors are called there.

    decoder                                              transformers
    grouped-query attention                              LlamaForCausalLM
    the same, mixture of experts                         Ernie4_5_MoeForCausalLM
    with query and key norms (qwen3)                     Qwen3ForCausalLM
    the same, mixture of experts                         Qwen3MoeForCausalLM
    latent attention, mixture of experts (deepseek_v3)   DeepseekV3ForCausalLM

The configuration is read off TorchTitan's, which is what computes, so that it serves our own flavors with any
``[model.shape]`` and the models of TorchTitan alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torchtitan.models.common import ComplexRoPE, CosSinRoPE, GQAttention, RoPE
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3.model import Attention as LatentAttention
from torchtitan.models.deepseek_v3.model import DeepSeekV3Model, DeepSeekV3TransformerBlock
from torchtitan.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from nitp_titan.models.ernie import ErnieStateDictAdapter
from nitp_titan.models.hf.config_facts import dense_of, experts_of, heads_of, moe_of, n_dense, rope_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A stock architecture of transformers."""

    name: str
    model_type: str
    adapter: type[BaseStateDictAdapter]
    own_keys: Callable[[Decoder.Config], dict[str, Any]]
    """Keys of its configuration besides those that all share."""
    own_needs: Callable[[Decoder.Config], Iterator[str]]
    """What it needs and does not find, besides what all need."""
    keep_fp32: tuple[str, ...] = ()
    """Ends of the names of tensors that transformers keeps in fp32 whatever the model's dtype."""
    remark: str = ""
    """What a user is told of a mapping that is not exact to the last digit."""


def architecture_of(config: Decoder.Config) -> Architecture | None:
    """Return the architecture of a decoder without NITP; None where none is known."""
    block = _BLOCKS.get(type(config))
    if block is None or any(type(layer) is not block for layer in config.layers):
        return None
    attention, sparse = type(config.layers[0].attention), moe_of(config) is not None
    if any(type(layer.attention) is not attention for layer in config.layers):
        return None
    if attention is LatentAttention.Config:
        return DEEPSEEK_V3 if sparse else None
    if attention is not GQAttention.Config:
        return None
    if config.layers[0].attention.qk_norm is None:
        return ERNIE_MOE if sparse else LLAMA
    return QWEN3_MOE if sparse else QWEN3


def obstacles(config: Decoder.Config) -> list[str]:
    """Return why no stock architecture computes what the decoder does; empty where one does."""
    architecture = architecture_of(config)
    if architecture is None:
        return [f"no stock architecture of transformers is known for {type(config).__qualname__} with its blocks"]
    needs = [*_common_needs(config), *architecture.own_needs(config)]
    return [f"{architecture.name} needs {need}" for need in needs]


def hf_config(config: Decoder.Config) -> dict[str, Any]:
    """Return the contents of ``config.json``, without dtype and special tokens.

    Raises:
        ValueError: no stock architecture computes the same; the message is :func:`obstacles`.
    """
    architecture = architecture_of(config)
    if architecture is None or obstacles(config):
        raise ValueError("; ".join(obstacles(config)))
    dense, rope = dense_of(config), rope_parameters(config.layers[0].attention)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        # A model without dense blocks has no such width; the key takes part in nothing then.
        "intermediate_size": dense.w1.out_features if dense else experts_of(moe_of(config))["hidden_dim"],
        "num_hidden_layers": len(config.layers),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.eps,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": rope,
        # As transformers 4 calls them. It reads nothing else, and has another base where it finds none.
        "rope_theta": rope["rope_theta"],
        **({"rope_scaling": scaling} if rope["rope_type"] != "default" else {}),
        "tie_word_embeddings": config.enable_weight_tying,
        "use_cache": True,
        **architecture.own_keys(config),
    }


def _common_needs(config: Decoder.Config) -> Iterator[str]:
    layers = config.layers
    eps = {norm.eps for layer in layers for norm in (layer.attention_norm, layer.ffn_norm)} | {config.norm.eps}
    eps |= {layer.attention.qk_norm.eps for layer in layers if getattr(layer.attention, "qk_norm", None) is not None}
    if len(eps) > 1:
        yield f"one epsilon for all norms, found {sorted(eps)}"
    shapes = [
        (heads_of(config, layer.attention), rope_parameters(layer.attention), type(layer.attention.rope))
        for layer in layers
    ]
    normed = {getattr(layer.attention, "qk_norm", None) is not None for layer in layers}
    if any(shape != shapes[0] for shape in shapes) or len(normed) > 1:
        yield "the same attention and rotary positions in every block"
    widths = {layer.feed_forward.w1.out_features for layer in layers if layer.feed_forward is not None}
    experts = [experts_of(layer.moe) for layer in layers if layer.moe is not None]
    if len(widths) > 1 or any(block != experts[0] for block in experts):
        yield "feed-forwards of one width, and the same experts in every block that has them"


def _rotary_needs(config: Decoder.Config, kind: type[RoPE.Config]) -> Iterator[str]:
    found = type(config.layers[0].attention.rope)
    if not issubclass(found, kind):
        yield f"the rotary pairs of {kind.__qualname__}, found {found.__qualname__}"


def _router_needs(config: Decoder.Config, *, score_func: str, shared: bool, groups: bool = False) -> Iterator[str]:
    experts = experts_of(moe_of(config))
    if experts["score_func"] != score_func:
        yield f'a {score_func} router, found router_score_func = "{experts["score_func"]}"'
    if experts["gated"] or experts["num_shared"] % 1:
        yield "shared experts without a gate, as wide as a whole number of routed ones"
    if bool(experts["num_shared"]) and not shared:
        yield "no shared experts"
    if not groups and (experts["num_expert_groups"] or experts["route_scale"] != 1):
        yield "a router without groups and scale"


def _dense_first(config: Decoder.Config) -> Iterator[str]:
    if any(layer.moe is None for layer in config.layers[n_dense(config) :]):
        yield "its dense blocks below those with experts"


def _llama_needs(config: Decoder.Config) -> Iterator[str]:
    yield from _rotary_needs(config, ComplexRoPE.Config)
    heads = config.layers[0].attention.n_heads
    if config.dim % heads:
        yield f"dim a multiple of n_heads, found {config.dim} and {heads}"


def _ernie_needs(config: Decoder.Config) -> Iterator[str]:
    yield from _rotary_needs(config, ComplexRoPE.Config)
    yield from _router_needs(config, score_func="softmax", shared=True)
    yield from _dense_first(config)
    experts, heads = experts_of(moe_of(config)), heads_of(config, config.layers[0].attention)
    if not experts["route_norm"]:
        yield "the weights of the chosen experts to add up to 1, found router_norm = false"
    if not experts["bias"]:
        yield "a selection bias (load_balance_coeff)"
    if heads["head_dim"] * heads["num_attention_heads"] != config.dim:
        found = f"{heads['head_dim']} x {heads['num_attention_heads']}"
        yield f"head_dim x n_heads equal to dim, found {found} and {config.dim}"


def _ernie_keys(config: Decoder.Config) -> dict[str, Any]:
    experts, heads = experts_of(moe_of(config)), heads_of(config, config.layers[0].attention)
    del heads["head_dim"]
    return {
        **heads,
        "use_bias": False,
        "moe_num_experts": experts["num_experts"],
        "moe_k": experts["top_k"],
        "moe_intermediate_size": experts["hidden_dim"],
        "moe_num_shared_experts": int(experts["num_shared"]),
        "moe_layer_start_index": n_dense(config),
        "moe_layer_end_index": len(config.layers) - 1,
        "moe_layer_interval": 1,
        # What TorchTitan adds to the sum of the weights before it divides by it; here it bounds the sum.
        "moe_norm_min": 1e-20,
    }


def _qwen3_keys(config: Decoder.Config) -> dict[str, Any]:
    keys = {**heads_of(config, config.layers[0].attention), "attention_bias": False, "use_sliding_window": False}
    if moe_of(config) is None:
        return keys
    experts = experts_of(moe_of(config))
    return keys | {
        "num_experts": experts["num_experts"],
        "num_experts_per_tok": experts["top_k"],
        "moe_intermediate_size": experts["hidden_dim"],
        "norm_topk_prob": experts["route_norm"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(config.layers) if layer.moe is None],
    }


def _qwen3_moe_needs(config: Decoder.Config) -> Iterator[str]:
    yield from _rotary_needs(config, CosSinRoPE.Config)
    yield from _router_needs(config, score_func="softmax", shared=False)


def _deepseek_needs(config: Decoder.Config) -> Iterator[str]:
    yield from _rotary_needs(config, ComplexRoPE.Config)
    yield from _router_needs(config, score_func="sigmoid", shared=True, groups=True)
    yield from _dense_first(config)
    experts = experts_of(moe_of(config))
    if not experts["num_shared"] or not experts["bias"]:
        yield "shared experts and a selection bias"
    if getattr(config, "mtp_layers", None):
        yield "no multi-token-prediction heads"


def _deepseek_keys(config: Decoder.Config) -> dict[str, Any]:
    experts = experts_of(moe_of(config))
    return {
        **heads_of(config, config.layers[0].attention),
        "attention_bias": False,
        "rope_interleave": True,
        "n_routed_experts": experts["num_experts"],
        "num_experts_per_tok": experts["top_k"],
        "moe_intermediate_size": experts["hidden_dim"],
        "n_shared_experts": int(experts["num_shared"]),
        "first_k_dense_replace": n_dense(config),
        "norm_topk_prob": experts["route_norm"],
        "routed_scaling_factor": experts["route_scale"],
        "n_group": experts["num_expert_groups"] or 1,
        "topk_group": experts["num_limited_groups"] or 1,
        "num_nextn_predict_layers": 0,
    }


_BLOCKS: dict[type, type] = {
    Llama3Model.Config: Llama3TransformerBlock.Config,
    Qwen3Model.Config: Qwen3TransformerBlock.Config,
    DeepSeekV3Model.Config: DeepSeekV3TransformerBlock.Config,
}
"""Decoders whose forward pass is known, and their blocks."""

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    # It turns adjacent rotary pairs into transformers' halves.
    adapter=Llama3StateDictAdapter,
    own_keys=lambda config: {
        **heads_of(config, config.layers[0].attention),
        "attention_bias": False,
        "mlp_bias": False,
    },
    own_needs=_llama_needs,
)
ERNIE_MOE = Architecture(
    name="Ernie4_5_MoeForCausalLM",
    model_type="ernie4_5_moe",
    adapter=ErnieStateDictAdapter,
    own_keys=_ernie_keys,
    own_needs=_ernie_needs,
    keep_fp32=("mlp.gate.weight", "e_score_correction_bias"),
)
QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    adapter=Qwen3StateDictAdapter,
    own_keys=_qwen3_keys,
    own_needs=lambda config: _rotary_needs(config, CosSinRoPE.Config),
)
QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    adapter=Qwen3StateDictAdapter,
    own_keys=_qwen3_keys,
    own_needs=_qwen3_moe_needs,
)
DEEPSEEK_V3 = Architecture(
    name="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    adapter=DeepSeekV3StateDictAdapter,
    own_keys=_deepseek_keys,
    own_needs=_deepseek_needs,
    keep_fp32=("e_score_correction_bias",),
    # Scaling the weights before these norms would be exact, and wrong everywhere else: in vLLM, back in TorchTitan.
    remark="transformers norms its latents with epsilon 1e-6, TorchTitan with 1e-5: logits differ in the fifth digit",
)
