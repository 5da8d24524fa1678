"""Which layers are converted, which are left and why; of our models without building them."""

from __future__ import annotations

from pathlib import Path

import pytest
import spmd_types as spmd
from torchtitan.distributed.parallel_dims import MeshAxisName
from torchtitan.models.common.linear import Linear

from nitp_titan.decoder import nitp_model_spec
from nitp_titan.float8.config import AUTO_FILTER, Float8Config
from nitp_titan.float8.gain import times
from nitp_titan.float8.plan import LinearLayer, experts_problem, layers_of_shape, plan, tokens_at_a_time, unmatched
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.models.registry import decoder_config, model_registry
from nitp_titan.nitp_config import NITPConfig
from tests.decoders import ODD_SHAPES, OWN, STOCK, backbone
from tests.trainers import trainer_config

SHAPES = {name: flavor.shape for name, flavor in FLAVORS.items()} | ODD_SHAPES
LAYERS = [
    LinearLayer(name="lm_head", in_features=2048, out_features=32000),
    LinearLayer(name="layers.0.attention.wo", in_features=4096, out_features=4096),
    LinearLayer(name="layers.1.attention.wo", in_features=4096, out_features=4096),
    LinearLayer(name="layers.0.feed_forward.w1", in_features=4096, out_features=100),
    LinearLayer(name="layers.0.feed_forward.w2", in_features=512, out_features=512),
    LinearLayer(name="layers.1.moe.router.gate", in_features=4096, out_features=64),
    LinearLayer(name="layers.1.odd", in_features=4096, out_features=4096, special=True),
]


def planned(tokens: int = 16384, tensor_parallel: int = 1, layers=LAYERS, **float8):
    return plan(
        Float8Config(**{"recipe": "tensorwise", **float8}), layers, tokens=tokens, tensor_parallel=tensor_parallel
    )


def converted(made) -> list[str]:
    return [choice.layer.name for choice in made.converted]


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


def test_what_is_left_has_a_reason():
    assert {choice.layer.name: choice.left_because for choice in planned(filter_fqns=["layers.1.att"]).choices} == {
        "lm_head": "the unembedding stays in high precision",
        "layers.0.attention.wo": "",
        "layers.1.attention.wo": 'filter_fqns has "layers.1.att"',
        "layers.0.feed_forward.w1": "not a multiple of 16",
        "layers.0.feed_forward.w2": "",
        "layers.1.moe.router.gate": "routers stay in high precision",
        "layers.1.odd": "a linear layer with a product of its own",
    }


def test_the_automatic_filter_leaves_what_does_not_gain_and_converts_the_rest():
    everything, automatic = planned(), planned(filter_fqns=[AUTO_FILTER])
    assert converted(everything) == ["layers.0.attention.wo", "layers.1.attention.wo", "layers.0.feed_forward.w2"]
    assert converted(automatic) == ["layers.0.attention.wo", "layers.1.attention.wo"]
    assert "torchao's measurements" in automatic.choices[4].left_because
    assert converted(planned(filter_fqns=[AUTO_FILTER, "layers.0"])) == ["layers.1.attention.wo"]
    # Of few tokens nothing gains.
    assert converted(planned(tokens=512, filter_fqns=[AUTO_FILTER])) == []


def test_tensor_parallelism_makes_layers_too_small():
    layers = [LinearLayer(name="layers.0.feed_forward.w1", in_features=4096, out_features=2048)]
    assert len(planned(filter_fqns=[AUTO_FILTER], layers=layers).converted) == 1
    assert planned(filter_fqns=[AUTO_FILTER], layers=layers, tensor_parallel=2).converted == []
    # 48 outputs are a multiple of 16, 24 are not.
    layers = [LinearLayer(name="layers.0.feed_forward.w1", in_features=4096, out_features=48)]
    assert [choice.left_because for choice in planned(layers=layers, tensor_parallel=2).choices] == [
        "not a multiple of 16"
    ]


def test_lines_tell_each_kind_of_layer_once():
    bf16, float8 = times("tensorwise", 16384, 4096, 4096)
    assert list(planned().lines()) == [
        "left      lm_head, 2048 -> 32000: the unembedding stays in high precision",
        f"converted layers.*.attention.wo x 2, 4096 -> 4096: at most {bf16 / float8:.2f}x as fast",
        "left      layers.*.feed_forward.w1, 4096 -> 100: not a multiple of 16",
        "converted layers.*.feed_forward.w2, 512 -> 512: too small by torchao's measurements (K <= 4096 and N <= 1024)",
        "left      layers.*.moe.router.gate, 4096 -> 64: routers stay in high precision",
        "left      layers.*.odd, 4096 -> 4096: a linear layer with a product of its own",
    ]
    assert planned().summary().startswith("tensorwise: 3 of 7 linear layers converted (these at most 1.")
    assert planned(emulate=True).summary() == "tensorwise: 3 of 7 linear layers converted; emulated"


def test_a_loss_and_an_empty_conversion_are_told():
    quiet = {"compiled": True, "gpu": True}
    [warning] = planned().warnings(**quiet)
    assert "no gain expected on 1 of 3 converted layers: layers.*.feed_forward.w2;" in warning
    assert AUTO_FILTER in warning
    assert list(planned(filter_fqns=[AUTO_FILTER]).warnings(**quiet)) == []
    [warning] = planned(tokens=512, filter_fqns=[AUTO_FILTER]).warnings(**quiet)
    assert warning == "float8 tensorwise converts nothing: no gain expected on any layer that could be"
    [warning] = planned(filter_fqns=["layers"]).warnings(**quiet)
    assert "converts nothing: the unembedding stays in high precision, " in warning
    only_small = planned(layers=LAYERS[4:5])
    assert "no gain expected" in only_small.summary()


def test_experts_alone_are_something():
    config = Float8Config(recipe="rowwise", filter_fqns=["layers"], experts=True)
    made = plan(config, LAYERS, tokens=16384, experts=3)
    assert list(made.warnings(compiled=True, gpu=True)) == []
    assert "the routed experts of 3 blocks (rowwise)" in made.summary()
    assert plan(Float8Config(recipe="rowwise"), LAYERS, tokens=16384, experts=3).experts == 0


def test_eager_and_emulated_runs_are_told():
    automatic = [AUTO_FILTER]
    [warning] = planned(filter_fqns=automatic).warnings(compiled=False, gpu=True)
    assert "gains nothing without torch.compile" in warning
    [warning] = planned(filter_fqns=automatic, emulate=True).warnings(compiled=False, gpu=True)
    assert "float8.emulate is on" in warning
    assert list(planned(emulate=True).warnings(compiled=False, gpu=False)) == []


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


def test_the_documented_table_is_the_plans():
    text = Path(__file__, "../../../docs/float8.md").resolve().read_text()
    for name, flavor in FLAVORS.items():
        if name.startswith("debug"):
            continue
        training = flavor.job_defaults["training"]
        tokens = training["local_batch_size"] * training["seq_len"]
        cells = [name, f"{flavor.shape.dim:,}", f"{tokens:,}"]
        for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
            layers = list(layers_of_shape(flavor.shape, NITPConfig()))
            made = planned(tokens, layers=layers, recipe=recipe, filter_fqns=[AUTO_FILTER])
            share = f"{len(made.converted)} of {len(layers)}, {made.speedup():.2f}x"
            cells.append(share if made.converted else "none")
        assert f"| {' | '.join(cells)} |" in text
