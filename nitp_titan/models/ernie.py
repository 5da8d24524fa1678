"""Our mixtures of experts under the names of ``Ernie4_5_MoeForCausalLM``, and back."""

# Shape suffixes: E = experts, F = expert hidden dim, D = model dim

from __future__ import annotations

from typing import Any

from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter
from torchtitan.models.utils import MoEStateDictAdapter

_BIAS = "mlp.moe_statics.e_score_correction_bias"


class ErnieStateDictAdapter(DeepSeekV3StateDictAdapter):
    """Our mixtures of experts <-> ``Ernie4_5_MoeForCausalLM``, one tensor per expert, sharded or not.

    What moves the experts is DeepSeek-V3's adapter, which also refuses unknown names (KeyError). The attention has
    other names, and the selection bias (E,) is (1, E). Both turn adjacent pairs in their rotary positions, so that
    queries and keys stay as they are.
    """

    def __init__(self, model_config: Decoder.Config, hf_assets_path: str | None):
        # Not DeepSeek-V3's own, whose names depend on its latent attention.
        MoEStateDictAdapter.__init__(self, model_config, hf_assets_path)
        theirs, ours = "model.layers.{}.", "layers.{}."
        names = {
            "input_layernorm.weight": "attention_norm.weight",
            "self_attn.q_proj.weight": "attention.qkv_linear.wq.weight",
            "self_attn.k_proj.weight": "attention.qkv_linear.wk.weight",
            "self_attn.v_proj.weight": "attention.qkv_linear.wv.weight",
            "self_attn.o_proj.weight": "attention.wo.weight",
            "post_attention_layernorm.weight": "ffn_norm.weight",
            "mlp.gate.weight": "moe.router.gate.weight",
            _BIAS: "moe.expert_bias_E",
            "mlp.experts.{}.gate_proj.weight": "moe.routed_experts.inner_experts.w1_EFD",
            "mlp.experts.{}.up_proj.weight": "moe.routed_experts.inner_experts.w3_EFD",
            "mlp.experts.{}.down_proj.weight": "moe.routed_experts.inner_experts.w2_EDF",
        }
        for part, matrix in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            names[f"mlp.{part}.weight"] = f"feed_forward.{matrix}.weight"
            names[f"mlp.shared_experts.{part}.weight"] = f"moe.shared_experts.{matrix}.weight"
        self.from_hf_map = {
            "model.embed_tokens.weight": "tok_embeddings.weight",
            **{theirs + name: ours + native for name, native in names.items()},
            "model.norm.weight": "norm.weight",
            "lm_head.weight": "lm_head.weight",
        }

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Rename and split; a tied unembedding is left out, as transformers does.

        Raises:
            KeyError: a name that the architecture has no place for.
        """
        if self.model_config.enable_weight_tying:
            state_dict = {key: value for key, value in state_dict.items() if key != "lm_head.weight"}
            (self.fqn_to_index_mapping or {}).pop("lm_head.weight", None)
        renamed = super().to_hf(state_dict)
        return {key: value.unsqueeze(0) if key.endswith(_BIAS) else value for key, value in renamed.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The inverse of ``to_hf``."""
        state_dict = super().from_hf(
            {key: value.squeeze(0) if key.endswith(_BIAS) else value for key, value in hf_state_dict.items()}
        )
        if self.model_config.enable_weight_tying:
            state_dict["lm_head.weight"] = state_dict["tok_embeddings.weight"]
        return state_dict
