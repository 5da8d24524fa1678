"""config.json against a decoder: what transformers writes and reads of the stock architectures."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from nitp_titan.job.model_facts import facts
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.models.hf.architectures import architecture_of, hf_config
from nitp_titan.models.hf.config_facts import computed_by
from nitp_titan.models.hf.config_json import computed_by_shape, differences
from nitp_titan.models.registry import decoder_config
from tests.helpers.decoders import ODD_SHAPES, backbone
from tests.helpers.foreign import model_registry as foreign_registry

SHAPES = {name: flavor.shape for name, flavor in FLAVORS.items()} | ODD_SHAPES
MODELS = [("nitp_titan", "debug"), ("nitp_titan", "debug_moe"), ("llama3", "debugmodel"), ("qwen3", "debugmodel")]
MODELS += [("foreign", "qwen3_moe"), ("foreign", "deepseek_v3")]


def decoder(module: str, flavor: str):
    return (foreign_registry(flavor) if module == "foreign" else backbone(module, flavor)).model


def computed(config):
    return computed_by(config, architecture_of(config).name)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_computes_what_its_decoder_does(name):
    assert computed_by_shape(SHAPES[name]) == computed(decoder_config(SHAPES[name]))


@pytest.mark.parametrize(("module", "flavor"), MODELS)
def test_what_is_exported_does_not_differ(module, flavor):
    config = decoder(module, flavor)
    assert differences(hf_config(config), computed(config)) == []
    # As transformers writes it again, with its own names and defaults.
    theirs = AutoConfig.for_model(**hf_config(config))
    assert differences(json.loads(theirs.to_json_string(use_diff=False)), computed(config)) == []
    assert differences(json.loads(theirs.to_json_string(use_diff=True)), computed(config)) == []


SIZES = {"num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size"}
SIZES |= {"moe_intermediate_size", "architectures", "model_type", "kv_lora_rank", "qk_nope_head_dim"}
SIZES |= {"qk_rope_head_dim", "v_head_dim", "n_routed_experts"}


@pytest.mark.parametrize(("module", "flavor"), MODELS)
def test_a_missing_key_means_what_it_does_to_transformers(module, flavor):
    config = decoder(module, flavor)
    whole = hf_config(config)
    for key in whole.keys() - SIZES:
        short = {name: value for name, value in whole.items() if name != key}
        theirs = json.loads(AutoConfig.for_model(**short).to_json_string(use_diff=False))
        nobody = dict.fromkeys(computed(config), "nobody's")
        found, expected = ({d.said.name: d.said.value for d in differences(v, nobody)} for v in (short, theirs))
        assert found == expected, key
        assert len(found) > 10


CHANGES = {
    ("nitp_titan", "debug"): {
        "num_hidden_layers": (3, "n_layers"),
        "hidden_size": (256, "dim"),
        "num_attention_heads": (8, "n_heads"),
        "num_key_value_heads": (4, "n_kv_heads"),
        "head_dim": (64, "head_dim"),
        "intermediate_size": (100, "hidden_dim"),
        "vocab_size": (321, "vocab_size"),
        "rms_norm_eps": (1e-5, "norm_eps"),
        "tie_word_embeddings": (True, "tie_embeddings"),
        "hidden_act": ("gelu", "activation"),
        "attention_bias": (True, "attention_bias"),
        "mlp_bias": (True, "mlp_bias"),
        "rope_scaling": ({"type": "linear", "factor": 2.0}, "rope_type"),
        "architectures": (["LlamaForSequenceClassification"], "architecture"),
    },
    ("nitp_titan", "debug_moe"): {
        "moe_num_experts": (4, "num_experts"),
        "moe_k": (1, "top_k"),
        "moe_num_shared_experts": (2, "num_shared_experts"),
        "moe_layer_start_index": (2, "n_dense_layers"),
        "moe_layer_interval": (2, "n_dense_layers"),
        "moe_layer_end_index": (2, "n_dense_layers"),
        "moe_intermediate_size": (64, "expert_hidden_dim"),
        "use_bias": (True, "mlp_bias"),
    },
    ("qwen3", "debugmodel"): {
        "use_sliding_window": (True, None),  # of blocks above the 28th
        "layer_types": (["sliding_attention"] * 8, None),
        "model_type": ("qwen2", "architecture"),
    },
    ("foreign", "qwen3_moe"): {
        "num_experts": (4, "num_experts"),
        "norm_topk_prob": (False, "router_norm"),
        "mlp_only_layers": ([0], "n_dense_layers"),
        "decoder_sparse_step": (2, "n_dense_layers"),
        "use_sliding_window": (True, "sliding_window"),
    },
    ("foreign", "deepseek_v3"): {
        "kv_lora_rank": (7, "kv_lora_rank"),
        "q_lora_rank": (7, "q_lora_rank"),
        "qk_rope_head_dim": (8, "qk_rope_head_dim"),
        "v_head_dim": (8, "v_head_dim"),
        "rope_interleave": (False, "rope_interleave"),
        "n_group": (4, "router_groups"),
        "topk_group": (2, "router_groups_chosen"),
        "routed_scaling_factor": (1.0, "router_scale"),
        "first_k_dense_replace": (0, "n_dense_layers"),
        "n_shared_experts": (7, "num_shared_experts"),
    },
}
CASES = [(*model, key, *change) for model, changes in CHANGES.items() for key, change in changes.items()]


@pytest.mark.parametrize(("module", "flavor", "key", "value", "name"), CASES)
def test_every_difference_is_named(module, flavor, key, value, name):
    config = decoder(module, flavor)
    found = differences(hf_config(config) | {key: value}, computed(config))
    assert {difference.said.name for difference in found} == ({name} if name else set()) | (
        {"attention_bias"} if key == "use_bias" else set()
    )


def test_a_router_that_the_architecture_does_not_have_differs():
    config = decoder("deepseek_v3", "debugmodel")
    values = hf_config(decoder("foreign", "deepseek_v3"))
    found = {d.said.name: (d.said.value, d.ours) for d in differences(values, computed(config))}
    assert found["router_score_func"] == ("sigmoid", "softmax")


def test_a_sliding_window_is_seen_where_it_is_in_force():
    config = decoder("qwen3", "debugmodel")
    windowed = hf_config(config) | {"use_sliding_window": True, "sliding_window": 64}
    for more in ({"max_window_layers": 2}, {"layer_types": ["full_attention"] * 7 + ["sliding_attention"]}):
        assert [(d.said.name, d.said.value) for d in differences(windowed | more, computed(config))] == [
            ("sliding_window", 64)
        ]


def without_rope(config):
    return {key: value for key, value in hf_config(config).items() if not key.startswith("rope_")}


def test_rotary_bases_of_both_transformers_are_read():
    config = decoder("nitp_titan", "debug")
    ours, bare = computed(config), without_rope(config)
    for rope in (
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
    ):
        found = differences(bare | rope, ours)
        assert [(d.said.name, d.said.value, d.ours) for d in found] == [("rope_theta", 5e5, 1e4)]
    assert differences(bare, ours) == []
    moe = decoder("nitp_titan", "debug_moe")
    assert [d.said.value for d in differences(without_rope(moe), computed(moe))] == [5e5]  # Ernie's


LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_published_configurations_are_the_flavors_that_carry_their_names():
    assert differences(LLAMA_31_8B, facts("llama3", "8B").computed) == []
    assert differences(QWEN3_06B, facts("qwen3", "0.6B").computed) == []
    scaling = LLAMA_31_8B["rope_scaling"] | {"factor": 32.0, "high_freq_factor": 2.0}
    found = differences(LLAMA_31_8B | {"rope_scaling": scaling}, facts("llama3", "8B").computed)
    assert {(d.said.name, d.said.value, d.ours) for d in found} == {
        ("rope_factor", 32.0, 8.0),
        ("rope_high_freq_factor", 2.0, 4.0),
    }
    plain = differences(LLAMA_31_8B | {"rope_scaling": None}, facts("llama3", "8B").computed)
    assert [(d.said.name, d.said.value, d.ours) for d in plain] == [("rope_type", "default", "llama3")]


def test_yarn_is_compared_by_what_it_comes_to():
    ours = facts("deepseek_v3", "671B").computed
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    values = {"rope_theta": 10000, "rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}}
    rest = {"model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128}
    rest |= {"vocab_size": 129280, "intermediate_size": 18432, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
    rest |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "moe_intermediate_size": 2048}
    # TorchTitan's norms have another epsilon than the published model's.
    assert [(d.said.name, d.said.value, d.ours) for d in differences(rest | values, ours)] == [("norm_eps", 1e-6, 1e-5)]
    # Without "all_dim" transformers scales keys and queries instead of the softmax.
    names = {d.said.name for d in differences(rest | values | {"rope_scaling": yarn}, ours)}
    assert names == {"norm_eps", "rope_attention_factor", "rope_mscale_all_dim"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": "three"}, "num_hidden_layers = 'three', expected a whole number"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"num_attention_heads": 0}, "expected a whole number"),
        ({"rope_parameters": [1]}, "has a value that is none of its kind"),
    ],
)
def test_a_broken_configuration_is_told(change, message):
    config = decoder("nitp_titan", "debug")
    values = {key: value for key, value in hf_config(config).items() if key != "rope_scaling"}
    with pytest.raises(ValueError, match=message):
        differences(values | change, computed(config))


def test_an_unknown_kind_is_compared_as_far_as_names_are_common():
    config = decoder("nitp_titan", "debug")
    values = {"model_type": "gpt_neox", "num_hidden_layers": 3, "hidden_size": 128, "vocab_size": 50}
    found = {(d.said.name, d.said.value) for d in differences(values, computed(config))}
    assert found == {("architecture", "gpt_neox"), ("n_layers", 3), ("vocab_size", 50)}
    # Of a decoder that is none of the stock ones sizes are compared, wherever the file has them.
    nested = {"model_type": "kimi", "text_config": {"num_hidden_layers": 3, "hidden_size": 128}}
    assert [d.said.name for d in differences(nested, {"n_layers": 4, "dim": 128})] == ["n_layers"]
