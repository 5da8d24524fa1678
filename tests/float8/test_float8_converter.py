"""Conversion of a model's configuration: what becomes float8, what is left, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
import torch._inductor.config
import torchao.float8._inductor_patch
from torchtitan.components.quantization import Float8Linear
from torchtitan.components.quantization.utils import has_quantization
from torchtitan.config import CompileConfig
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts

from nitp_titan.float8 import converter as converter_module
from nitp_titan.float8.config import AUTO_FILTER, Float8Config
from nitp_titan.float8.converter import Float8Converter
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.titan.spec import nitp_model_spec
from nitp_titan.training.trainer import with_float8
from tests.helpers.decoders import OWN, STOCK, backbone, built
from tests.helpers.trainers import trainer_config


def converter(**float8) -> Float8Converter:
    float8 = Float8Config(**{"recipe": "rowwise", "emulate": True, **float8})
    return Float8Converter.Config(float8=float8, tokens=16384, model_compile_enabled=True).build()


def kinds(config) -> dict[str, bool]:
    """Whether each linear is a float8 one."""
    found = config.traverse(Linear.Config)
    return {name: isinstance(linear, Float8Linear.Config) for name, linear, _, _ in found}


@pytest.mark.parametrize(("module", "flavor"), STOCK + OWN)
@pytest.mark.parametrize("nitp", [True, False])
def test_every_plain_linear_is_converted_but_the_unembedding_and_the_routers(module, flavor, nitp):
    spec = nitp_model_spec(backbone(module, flavor), NITPConfig(enable=nitp))
    config = converter().convert(copy.deepcopy(spec.model))
    for name, is_float8 in kinds(config).items():
        assert is_float8 is (name != "lm_head" and not name.endswith("router.gate")), name
    assert kinds(config).get("projector.w1") is (True if nitp else None)
    assert has_quantization(config)
    with torch.device("meta"):
        plain, float8 = spec.model.build(), config.build()
    shapes = {name: (p.shape, p.dtype, type(p.data)) for name, p in plain.named_parameters()}
    assert {name: (p.shape, p.dtype, type(p.data)) for name, p in float8.named_parameters()} == shapes


def test_initial_values_are_those_without_float8():
    spec = nitp_model_spec(backbone("nitp_titan", "debug_moe"), NITPConfig())
    config = converter(experts=True).convert(copy.deepcopy(spec.model))
    expected = dict(built(spec).named_parameters())
    for name, parameter in built(dataclasses.replace(spec, model=config)).named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_the_projectors_filter_does_not_mind_that_nitp_is_off():
    assert kinds(converter(filter_fqns=["projector"]).convert(backbone("nitp_titan", "debug").model))[
        "layers.0.attention.wo"
    ]


def test_filtered_layers_stay():
    config = nitp_model_spec(backbone("nitp_titan", "debug"), NITPConfig()).model
    found = kinds(converter(filter_fqns=["projector", "layers.2.attention", "w3"]).convert(config))
    assert {name for name, is_float8 in found.items() if not is_float8} == {
        "lm_head",
        "projector.w1",
        "projector.w2",
        "projector.w3",
        "layers.2.attention.qkv_linear.wqkv",
        "layers.2.attention.wo",
        *(f"layers.{index}.feed_forward.w3" for index in range(6)),
    }


def test_the_automatic_filter_converts_what_gains(caplog):
    config = nitp_model_spec(backbone("nitp_titan", "0.5B"), NITPConfig()).model
    with caplog.at_level(logging.INFO):
        found = kinds(converter(recipe="tensorwise", filter_fqns=[AUTO_FILTER], emulate=True).convert(config))
    gained = {name for name, is_float8 in found.items() if is_float8}
    feed_forward = {f"layers.{index}.feed_forward.w{part}" for index in range(24) for part in (1, 2, 3)}
    assert gained == feed_forward | {"projector.w1", "projector.w3"}
    assert "tensorwise: 74 of 124 linear layers converted" in caplog.text
    assert "left      layers.*.attention.wo x 24, 896 -> 896: too small by torchao's measurements" in caplog.text


def test_a_conversion_of_nothing_warns(caplog):
    config = backbone("nitp_titan", "debug").model
    with caplog.at_level(logging.WARNING):
        found = kinds(converter(filter_fqns=[AUTO_FILTER]).convert(config))
    assert not any(found.values())
    assert "float8 rowwise converts nothing: no gain expected" in caplog.text


def test_a_linear_with_a_product_of_its_own_stays():
    config = backbone("gpt_oss", "debugmodel").model
    found = kinds(converter().convert(config))
    assert found["layers.0.attention.qkv_linear.wqkv"]
    assert not found["layers.0.attention.wo"]  # divides its bias by the tensor-parallel degree


def test_bias_stays_a_bias():
    config = backbone("gpt_oss", "debugmodel").model
    linear = converter().convert(config).layers[0].attention.qkv_linear.wqkv.build()
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.fill_(3)
    assert torch.equal(linear(torch.ones(2, 256)), torch.full((2, linear.out_features), 3.0))


def test_the_callers_specification_is_left_as_it_was(tmp_path, corpus):
    config = trainer_config(tmp_path, corpus)
    assert with_float8(config) is config
    config.float8 = Float8Config(recipe="rowwise", emulate=True)
    assert any(kinds(with_float8(config).model_spec.model).values())
    assert not any(kinds(config.model_spec.model).values())


@pytest.mark.parametrize(
    ("flavor", "float8", "expected"),
    [
        ("debug", {"emulate": False}, 'float8.recipe: found "rowwise" on a device without float8 products'),
        ("debug", {"recipe": "none"}, 'float8.recipe: found "none"'),
        ("debug", {"experts": True}, "float8.experts: found true, expected false: the model has no routed experts"),
        ("debug", {"filter_fqns": ["atention"]}, 'found "atention", which is in no .*; did you mean "attention"?'),
    ],
)
def test_refused(flavor, float8, expected):
    with pytest.raises(ValueError, match=expected):
        converter(**float8).convert(backbone("nitp_titan", flavor).model)


def test_experts_need_more_than_linears(monkeypatch):
    monkeypatch.setattr(converter_module, "has_cuda_capability", lambda major, minor: (major, minor) <= (8, 9))
    converter(emulate=False)
    with pytest.raises(ValueError, match=r"float8\.experts: found true, expected a GPU of compute capability 9\.0"):
        converter(emulate=False, experts=True)


def test_a_number_of_tokens_that_products_cannot_have(monkeypatch):
    monkeypatch.setattr(converter_module, "has_cuda_capability", lambda major, minor: True)
    made = Float8Converter.Config(float8=Float8Config(recipe="rowwise"), tokens=100).build()
    with pytest.raises(ValueError, match="a rank has 100 tokens at a time, expected a multiple of 16"):
        made.convert(backbone("nitp_titan", "debug").model)


@pytest.mark.parametrize(("recipe", "casts"), [("tensorwise", False), ("rowwise", True), ("rowwise_with_gw_hp", True)])
def test_compilation_keeps_what_a_recipe_needs_of_it(recipe, casts, monkeypatch):
    calls = []
    monkeypatch.setattr(torchao.float8._inductor_patch, "_patch_inductor_min_max_codegen", lambda: calls.append(1))
    with torch._inductor.config.patch(emulate_precision_casts=False):
        converter(recipe=recipe).convert(backbone("nitp_titan", "debug").model)
        assert torch._inductor.config.emulate_precision_casts is casts
    assert calls, "torchao's workaround of a miscompilation is missing"


@pytest.mark.parametrize("components", [["model"], ["loss"]])
def test_a_run_whose_model_is_not_compiled_is_warned(components, tmp_path, corpus, caplog, monkeypatch):
    monkeypatch.setattr(converter_module, "has_cuda_capability", lambda major, minor: True)
    config = trainer_config(tmp_path, corpus, float8=Float8Config(recipe="tensorwise"))
    config.compile = CompileConfig(enable=True, components=components)
    with_float8(config)
    assert ("gains nothing without torch.compile" in caplog.text) is ("model" not in components)


def test_experts_are_converted_only_where_asked():
    def classes(config) -> set[str]:
        return {type(experts)._owner.__name__ for _, experts, _, _ in config.traverse(GroupedExperts.Config)}

    config = backbone("nitp_titan", "debug_moe").model
    assert classes(converter().convert(copy.deepcopy(config))) == {"DtypePreservingGroupedExperts"}
    assert classes(converter(experts=True).convert(config)) == {"Float8[DtypePreservingGroupedExperts]"}
