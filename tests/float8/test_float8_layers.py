"""The layers that float8 is about, against the models that have them."""

from __future__ import annotations

import pytest
import spmd_types as spmd
from torchtitan.distributed.parallel_dims import MeshAxisName
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import MoE

from nitp_titan.float8.config import AUTO_FILTER, Float8Config
from nitp_titan.float8.layers import (
    LinearLayer,
    RoutedExperts,
    experts_of_shape,
    experts_problem,
    layers_of_shape,
    tokens_at_a_time,
    unmatched,
)
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.models.registry import decoder_config, model_registry
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.titan.spec import nitp_model_spec
from tests.float8.test_float8_plan import LAYERS
from tests.helpers.decoders import ODD_SHAPES, OWN, STOCK, backbone
from tests.helpers.trainers import trainer_config

SHAPES = {name: flavor.shape for name, flavor in FLAVORS.items()} | ODD_SHAPES


@pytest.mark.parametrize("nitp", [NITPConfig(), NITPConfig(projector_ratio=3), NITPConfig(enable=False)], ids=repr)
@pytest.mark.parametrize("name", SHAPES)
def test_layers_of_a_shape_are_those_of_the_model(name, nitp):
    shape = SHAPES[name]
    spec = model_registry("debug")
    spec.model = decoder_config(shape)
    config = nitp_model_spec(spec, nitp).model
    built = {fqn: (c.in_features, c.out_features) for fqn, c, _, _ in config.traverse(Linear.Config)}
    assert {layer.name: (layer.in_features, layer.out_features) for layer in layers_of_shape(shape, nitp)} == built


@pytest.mark.parametrize(("module", "flavor"), STOCK + OWN)
def test_local_shapes_are_those_of_torchtitans_sharding(module, flavor, tmp_path):
    config = trainer_config(tmp_path, tmp_path)
    config.parallelism.tensor_parallel_degree = 2
    model = nitp_model_spec(backbone(module, flavor), NITPConfig()).model
    model.update_from_config(config=config)
    seen = set()
    for name, linear, _, _ in model.traverse(Linear.Config):
        layer = LinearLayer(name=name, in_features=linear.in_features, out_features=linear.out_features)
        layout = (
            linear.sharding_config.state_shardings["weight"].per_axis_spmd_types() if linear.sharding_config else {}
        )
        placement = layout.get(MeshAxisName.TP)
        dim = placement.dim if isinstance(placement, spmd.Shard) else None
        k, n = linear.in_features, linear.out_features
        assert layer.local(2) == {None: (k, n), 0: (k, n // 2), 1: (k // 2, n)}[dim], name
        seen.add(dim)
    assert {0, 1} <= seen


@pytest.mark.parametrize("name", SHAPES)
def test_experts_of_a_shape_are_those_of_the_model(name):
    built = [
        RoutedExperts(
            name=f"{fqn}.routed_experts",
            dim=moe.routed_experts.inner_experts.dim,
            hidden_dim=moe.routed_experts.inner_experts.hidden_dim,
            num_experts=moe.num_experts,
            top_k=moe.router.top_k,
        )
        for fqn, moe, _, _ in decoder_config(SHAPES[name]).traverse(MoE.Config)
    ]
    assert list(experts_of_shape(SHAPES[name])) == built


def test_experts_of_a_rank():
    experts = RoutedExperts(name="", dim=64, hidden_dim=48, num_experts=8, top_k=2)
    assert experts.local(100, tensor_parallel=1, expert_parallel=1) == (200, 64, 48, 8)
    # Each rank has a quarter of the experts, and gets as many tokens as it sends.
    assert experts.local(100, tensor_parallel=1, expert_parallel=4) == (200, 64, 48, 2)
    # Tensor parallelism splits each expert, or its ranks share the tokens among them.
    assert experts.local(100, tensor_parallel=2, expert_parallel=1) == (200, 64, 24, 8)
    assert experts.local(100, tensor_parallel=2, expert_parallel=4) == (100, 64, 48, 2)


def test_words_that_match_nothing():
    words = ["atention", "wo", "attention.w", AUTO_FILTER, "xyzzy", "feed_forward.w9"]
    assert list(unmatched(Float8Config(filter_fqns=words), LAYERS)) == [
        ("atention", "attention"),
        ("xyzzy", ""),
        ("feed_forward.w9", "feed_forward.w2"),
    ]


def test_tokens_of_a_product():
    assert tokens_at_a_time(4, 8192, context=1, pipeline=1, microbatch=1) == 32768
    assert tokens_at_a_time(4, 8192, context=2, pipeline=2, microbatch=1) == 4096


def test_experts_of_odd_widths():
    assert experts_problem(128, 496) == ""
    assert experts_problem(128, 500) == "the experts' 500 should be a multiple of 16"
