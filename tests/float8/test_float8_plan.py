"""Which layers are converted, which are left and why; of our models without building them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nitp_titan.float8.config import AUTO_FILTER, Float8Config
from nitp_titan.float8.gain import times
from nitp_titan.float8.layers import LinearLayer, RoutedExperts, experts_of_shape, layers_of_shape
from nitp_titan.float8.plan import plan
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.nitp.config import NITPConfig

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


WIDE = RoutedExperts(name="layers.1.moe.routed_experts", dim=5120, hidden_dim=8192, num_experts=4, top_k=1)


def with_experts(*experts: RoutedExperts, tokens: int = 65536, on: bool = True, emulate: bool = False):
    config = Float8Config(recipe="tensorwise", filter_fqns=["layers", "lm_head"], experts=on, emulate=emulate)
    return plan(config, LAYERS, tokens=tokens, experts=experts)


def test_experts_alone_are_something():
    made = with_experts(WIDE)
    assert list(made.warnings(compiled=True, gpu=True)) == []
    assert "the routed experts of 1 blocks (rowwise)" in made.summary()
    # Gate, up and down: three products of one size.
    bf16, float8 = times("rowwise", 65536, 5120, 8192, 4)
    line = list(made.lines())[-1]
    name = "layers.*.moe.routed_experts"
    assert line == f"converted {name}, 4 experts of 5120 -> 8192 -> 5120: at most {bf16 / float8:.2f}x as fast"
    assert with_experts(WIDE, on=False).experts == ()


def test_experts_that_do_not_gain_are_told():
    narrow = dataclasses.replace(WIDE, name="layers.2.moe.routed_experts", hidden_dim=640)
    others = dataclasses.replace(narrow, name="layers.3.moe.routed_experts")
    made = with_experts(WIDE, narrow, others)
    [warning] = made.warnings(compiled=True, gpu=True)
    assert warning == (
        "float8.experts: no gain expected on the routed experts of 2 of 3 blocks: too small by torchao's measurements "
        "(N <= 2048); experts = false leaves them"
    )
    reason = "too small by torchao's measurements (N <= 2048)"
    line = f"converted layers.*.moe.routed_experts x 2, 4 experts of 5120 -> 640 -> 5120: {reason}"
    assert list(made.lines())[-1] == line
    assert list(with_experts(narrow, emulate=True).warnings(compiled=True, gpu=False)) == []
    # Wide enough, but with few tokens each: the weights are cast for them alone.
    [warning] = with_experts(WIDE, tokens=2048).warnings(compiled=True, gpu=True)
    assert "no gain by torchao's roofline" in warning


def test_the_papers_routed_experts_do_not_gain():
    for name, flavor in FLAVORS.items():
        if flavor.shape.num_experts and not name.startswith("debug"):
            training = flavor.job_defaults["training"]
            tokens = training["local_batch_size"] * training["seq_len"]
            made = with_experts(*experts_of_shape(flavor.shape), tokens=tokens)
            assert made.experts
            assert all(found.no_gain and found.speedup() < 1 for found in made.experts), name


def test_eager_and_emulated_runs_are_told():
    automatic = [AUTO_FILTER]
    [warning] = planned(filter_fqns=automatic).warnings(compiled=False, gpu=True)
    assert warning.endswith('set compile.enable = true, with "model" in compile.components')
    [warning] = planned(filter_fqns=automatic, emulate=True).warnings(compiled=False, gpu=True)
    assert "float8.emulate is on" in warning
    assert list(planned(emulate=True).warnings(compiled=False, gpu=False)) == []


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
