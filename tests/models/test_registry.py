"""The family's models: shapes, counts and what they are made of."""

import dataclasses

import pytest
import torch

from nitp_titan.models.flavors import FLAVORS, Shape
from nitp_titan.models.registry import model_registry
from tests.helpers.decoders import built


def counted_by_hand(shape: Shape) -> int:
    attention = shape.dim * shape.head_dim * (shape.n_heads + 2 * shape.n_kv_heads)
    attention += shape.n_heads * shape.head_dim * shape.dim
    total = shape.vocab_size * shape.dim * (1 if shape.tie_embeddings else 2) + shape.dim
    for layer in range(shape.n_layers):
        total += attention + 2 * shape.dim
        if not shape.num_experts or layer < shape.n_dense_layers:
            total += 3 * shape.dim * shape.hidden_dim
        else:
            expert = 3 * shape.dim * shape.expert_hidden_dim
            total += shape.num_experts * (expert + shape.dim) + shape.num_shared_experts * expert
    return total


@pytest.mark.parametrize("name", FLAVORS)
def test_parameters_are_those_counted_by_hand(name):
    with torch.device("meta"):
        model = model_registry(name).model.build()
    assert sum(p.numel() for p in model.parameters()) == counted_by_hand(FLAVORS[name].shape)


def test_debug_models_are_as_described():
    dense, moe = FLAVORS["debug"].shape, FLAVORS["debug_moe"].shape
    assert all(1e6 < counted_by_hand(shape) < 3e6 for shape in (dense, moe))
    assert all(shape.n_layers % 2 == shape.n_heads % 2 == 0 for shape in (dense, moe))
    assert not dense.tie_embeddings
    layers = model_registry("debug_moe").model.layers
    assert [layer.moe is not None for layer in layers] == [False, True, True, True]
    config = layers[1].moe
    assert (config.num_experts, config.router.top_k, config.shared_experts is not None) == (8, 2, True)
    assert (config.router.score_func, config.router.route_norm) == ("softmax", True)


def test_tied_embeddings_are_one_parameter():
    shape = dataclasses.replace(FLAVORS["debug"].shape, tie_embeddings=True)
    model = built(model_registry("debug", tie_embeddings=True))
    assert model.tok_embeddings.weight is model.lm_head.weight
    assert sum(p.numel() for p in model.parameters()) == counted_by_hand(shape)


def test_residual_writes_start_smaller():
    model = built(model_registry("debug"))
    layer = model.layers["0"]
    assert layer.attention.wo.weight.std().item() == pytest.approx(0.02 / 12**0.5, rel=0.1)
    assert layer.attention.qkv_linear.wqkv.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_unknown_flavor_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown flavor 'debugg'; nitp_titan has debug, debug_moe"):
        model_registry("debugg")


PAPER = {  # parameters in billions, PAPER.md section 3
    "0.5B": 0.494,
    "2B": 2.10,
    "3B": 3.03,
    "1.9B-A0.3B": 1.84,
    "3B-A0.5B": 3.20,
    "9B-A1B": 8.75,
    "45B-A5.5B": 44.94,
}


@pytest.mark.parametrize("name", PAPER)
def test_sizes_are_the_papers(name):
    assert counted_by_hand(FLAVORS[name].shape) / 1e9 == pytest.approx(PAPER[name], rel=5e-3)


@pytest.mark.parametrize("name", FLAVORS)
def test_no_flavor_contradicts_itself(name):
    assert list(FLAVORS[name].shape.problems()) == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"top_k": 9}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"head_dim": 30}, "head_dim"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"n_dense_layers": 4}, "n_dense_layers"),
        ({"dim": 0}, "dim"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"num_shared_experts": -1}, "num_shared_experts"),
    ],
)
def test_contradictions_are_named(changes, key):
    with pytest.raises(ValueError, match=rf"{key}: found"):
        model_registry("debug_moe", **changes)


def test_dense_models_have_no_expert_options():
    with pytest.raises(ValueError, match="top_k: found 2, expected 0 without routed experts"):
        model_registry("debug", top_k=2)
    with pytest.raises(ValueError, match="head_dim: found 33, expected an even number"):
        model_registry("debug", head_dim=33)


def test_options_that_the_paper_leaves_open_reach_the_model():
    config = model_registry(
        "debug_moe",
        router_score_func="sigmoid",
        router_norm=False,
        load_balance_coeff=0.5,
        rope_theta=5e5,
        norm_eps=1e-3,
    ).model
    moe = config.layers[1].moe
    assert (moe.router.score_func, moe.router.route_norm, moe.load_balance_coeff) == ("sigmoid", False, 0.5)
    assert (config.layers[0].attention.rope.theta, config.norm.eps) == (5e5, 1e-3)
