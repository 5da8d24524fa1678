"""The architectures of transformers: configurations and names. What they compute is tested in tests/test_export.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torchtitan.models.common import CosSinRoPE
from transformers import AutoConfig, AutoModelForCausalLM

from nitp_titan.models.costs import parts_of_shape
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.models.hf.architectures import architecture_of, hf_config, obstacles
from nitp_titan.models.registry import model_registry
from tests.helpers.decoders import backbone, built
from tests.helpers.foreign import model_registry as foreign_registry


def transformers_model(config):
    """What transformers makes of a decoder's configuration, on the meta device."""
    values = hf_config(config)
    theirs = AutoConfig.for_model(**values)
    for key, value in values.items():
        # What transformers 4 reads, 5 has under rope_parameters.
        assert key in ("rope_theta", "rope_scaling") or getattr(theirs, key) == value, key
    assert theirs.rope_parameters == values["rope_parameters"]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(theirs)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_every_flavor_has_the_parameters_in_transformers_that_it_has_here(flavor):
    config = model_registry(flavor).model
    assert obstacles(config) == []
    model = transformers_model(config)
    assert type(model).__name__ == hf_config(config)["architectures"][0]
    counted = sum(p.numel() for name, p in model.named_parameters() if "moe_statics" not in name)
    assert counted == parts_of_shape(FLAVORS[flavor].shape).total()
    assert model.config.pad_token_id is not None or model.get_input_embeddings().padding_idx is None


MODELS = [*(("nitp_titan", flavor) for flavor in ("debug", "debug_moe")), ("llama3", "debugmodel")]
MODELS += [("qwen3", "debugmodel"), ("foreign", "qwen3_moe"), ("foreign", "deepseek_v3")]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("flavor", ["debug", "debug_moe"])
def test_names_go_there_and_back(flavor, tied):
    spec = model_registry(flavor, tie_embeddings=tied)
    state = built(spec).state_dict()
    for name, tensor in state.items():
        if name.endswith("expert_bias_E"):
            tensor.normal_()
    adapter = spec.state_dict_adapter(spec.model, None)
    assert type(adapter) is architecture_of(spec.model).adapter
    away = adapter.to_hf(dict(state))
    assert ("lm_head.weight" in away) == (not tied)
    back = adapter.from_hf(away)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_experts_leave_with_names_that_they_own():
    spec = model_registry("debug_moe")
    adapter = spec.state_dict_adapter(spec.model, None)
    with pytest.raises(KeyError, match="projector"):
        adapter.to_hf({"projector.w1.weight": torch.zeros(1)})
    with pytest.raises(KeyError, match="nonsense"):
        adapter.to_hf({"layers.1.moe.nonsense": torch.zeros(1)})


ROPES = {
    "none": {},
    "llama": {"scaling": "llama", "scaling_factor": 4.0, "original_max_position_embeddings": 512},
    "yarn": {"scaling": "yarn", "rope_factor": 8.0, "original_seq_len": 512, "beta_fast": 16.0},
    "yarn, fractional": {"scaling": "yarn", "rope_factor": 8.0, "original_seq_len": 512, "truncate": False},
    "yarn without effect": {"scaling": "yarn", "rope_factor": 1.0},
}


# TorchTitan has no such scaling for half-split pairs.
CASES = [(*model, rope) for model in MODELS for rope in ROPES if not (rope == "llama" and "qwen3" in str(model))]


@pytest.mark.parametrize(("module", "flavor", "rope"), CASES)
def test_rotary_frequencies_are_the_same(module, flavor, rope):
    config = (foreign_registry(flavor) if module == "foreign" else backbone(module, flavor)).model
    halves = isinstance(config.layers[0].attention.rope, CosSinRoPE.Config)
    for layer in config.layers:
        plain = dataclasses.replace(layer.attention.rope, scaling="none", max_seq_len=4096)
        layer.attention.rope = dataclasses.replace(plain, **ROPES[rope])
    dim = config.layers[0].attention.rope.dim
    # Position 1 turns by the frequency itself.
    ours = config.layers[0].attention.rope.build().cache[1]
    if halves:
        angles = torch.asin(ours[dim : dim + dim // 2])
    else:
        angles = torch.angle(ours if ours.is_complex() else torch.view_as_complex(ours.view(-1, 2)))
    values = hf_config(config)
    from transformers.models import deepseek_v3, ernie4_5_moe, llama, qwen3, qwen3_moe

    kinds = {
        "llama": llama.modeling_llama.LlamaRotaryEmbedding,
        "ernie4_5_moe": ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeRotaryEmbedding,
        "qwen3": qwen3.modeling_qwen3.Qwen3RotaryEmbedding,
        "qwen3_moe": qwen3_moe.modeling_qwen3_moe.Qwen3MoeRotaryEmbedding,
        "deepseek_v3": deepseek_v3.modeling_deepseek_v3.DeepseekV3RotaryEmbedding,
    }
    theirs = AutoConfig.for_model(**values)
    # The same for transformers 4, under its names.
    assert (
        values.get("rope_scaling", {"rope_type": "default"}) | {"rope_theta": values["rope_theta"]}
        == (values["rope_parameters"])
    )
    rotary = kinds[values["model_type"]](theirs)
    torch.testing.assert_close(rotary.inv_freq[: len(angles)], angles, rtol=1e-4, atol=1e-6)
    assert rotary.attention_scaling == 1
    if values["model_type"] == "deepseek_v3":
        attention = deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention(theirs, 0)
        assert attention.scaling == pytest.approx(config.layers[0].attention.build().softmax_scale)


def changed(module: str, flavor: str, change) -> list[str]:
    config = (foreign_registry(flavor) if module == "foreign" else backbone(module, flavor)).model
    change(config)
    return obstacles(config)


def set_rope(config):
    for layer in config.layers:
        old = layer.attention.rope
        layer.attention.rope = CosSinRoPE.Config(dim=old.dim, max_seq_len=old.max_seq_len, theta=old.theta)


def set_router(**values):
    def change(config):
        for layer in config.layers:
            if layer.moe is not None:
                layer.moe.router = dataclasses.replace(layer.moe.router, **values)

    return change


def set_last(part: str, **values):
    """Change a part of the last block."""

    def change(config):
        layer = config.layers[-1]
        setattr(layer, part, dataclasses.replace(getattr(layer, part), **values))

    return change


def set_moe(**values):
    def change(config):
        for layer in config.layers:
            if layer.moe is not None:
                layer.moe = dataclasses.replace(layer.moe, **values)

    return change


def swap_blocks(config):
    config.layers = config.layers[::-1]


DENSE, MOE = ("nitp_titan", "debug"), ("nitp_titan", "debug_moe")
QWEN3_MOE, DEEPSEEK = ("foreign", "qwen3_moe"), ("foreign", "deepseek_v3")


@pytest.mark.parametrize(
    ("model", "change", "reason"),
    [
        (DENSE, set_rope, "LlamaForCausalLM needs the rotary pairs of ComplexRoPE.Config, found CosSinRoPE.Config"),
        (DENSE, set_last("ffn_norm", eps=1e-3), "one epsilon for all norms, found [1e-06, 0.001]"),
        (DENSE, set_last("attention", n_kv_heads=4), "the same attention and rotary positions in every block"),
        (MOE, set_router(score_func="sigmoid"), 'a softmax router, found router_score_func = "sigmoid"'),
        (MOE, set_router(route_norm=False), "add up to 1, found router_norm = false"),
        (MOE, set_router(route_scale=2.5), "a router without groups and scale"),
        (MOE, set_router(num_expert_groups=2, num_limited_groups=1), "a router without groups and scale"),
        (MOE, set_moe(load_balance_coeff=None), "a selection bias (load_balance_coeff)"),
        (MOE, swap_blocks, "its dense blocks below those with experts"),
        (MOE, set_last("moe", num_experts=4), "the same experts in every block that has them"),
        (MOE, set_last("attention", head_dim=16), "the same attention and rotary positions in every block"),
        (QWEN3_MOE, set_router(score_func="sigmoid"), "Qwen3MoeForCausalLM needs a softmax router"),
        (DEEPSEEK, set_router(score_func="softmax"), "DeepseekV3ForCausalLM needs a sigmoid router"),
        (DEEPSEEK, set_moe(shared_experts=None), "shared experts and a selection bias"),
    ],
)
def test_what_is_not_the_same_is_named(model, change, reason):
    found = changed(*model, change)
    assert any(reason in problem for problem in found), found


def test_heads_that_do_not_make_up_the_width_are_refused_for_experts_alone():
    def narrow(config):
        for layer in config.layers:
            layer.attention = dataclasses.replace(layer.attention, head_dim=16)

    assert changed(*DENSE, narrow) == []
    assert "head_dim x n_heads equal to dim, found 16 x 4 and 128" in changed(*MOE, narrow)[0]


def test_an_unknown_decoder_has_no_configuration():
    config = backbone("gpt_oss", "debugmodel").model
    assert architecture_of(config) is None
    with pytest.raises(ValueError, match="no stock architecture"):
        hf_config(config)
