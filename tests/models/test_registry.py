"""The family's models: shapes, counts and what they are made of."""

import dataclasses

import pytest
import torch

from nitp_titan.models.flavors import FLAVORS, Flavor
from nitp_titan.models.registry import decoder_config, model_registry
from tests.decoders import built


def counted_by_hand(flavor: Flavor) -> int:
    attention = flavor.dim * flavor.head_dim * (flavor.n_heads + 2 * flavor.n_kv_heads)
    attention += flavor.n_heads * flavor.head_dim * flavor.dim
    total = flavor.vocab_size * flavor.dim * (1 if flavor.tie_embeddings else 2) + flavor.dim
    for layer in range(flavor.n_layers):
        total += attention + 2 * flavor.dim
        if flavor.moe is None or layer < flavor.moe.n_dense_layers:
            total += 3 * flavor.dim * flavor.hidden_dim
        else:
            expert = 3 * flavor.dim * flavor.moe.expert_hidden_dim
            total += flavor.moe.num_experts * (expert + flavor.dim) + flavor.moe.num_shared_experts * expert
    return total


@pytest.mark.parametrize("name", FLAVORS)
def test_parameters_are_those_counted_by_hand(name):
    with torch.device("meta"):
        model = model_registry(name).model.build()
    assert sum(p.numel() for p in model.parameters()) == counted_by_hand(FLAVORS[name])


def test_debug_models_are_as_described():
    dense, moe = FLAVORS["debug"], FLAVORS["debug_moe"]
    assert all(1e6 < counted_by_hand(flavor) < 3e6 for flavor in (dense, moe))
    assert all(flavor.n_layers % 2 == flavor.n_heads % 2 == 0 for flavor in (dense, moe))
    assert not dense.tie_embeddings
    layers = model_registry("debug_moe").model.layers
    assert [layer.moe is not None for layer in layers] == [False, True, True, True]
    config = layers[1].moe
    assert (config.num_experts, config.router.top_k, config.shared_experts is not None) == (8, 2, True)
    assert (config.router.score_func, config.router.route_norm) == ("softmax", True)


def test_tied_embeddings_are_one_parameter():
    flavor = dataclasses.replace(FLAVORS["debug"], tie_embeddings=True)
    spec = dataclasses.replace(model_registry("debug"), model=decoder_config(flavor))
    model = built(spec)
    assert model.tok_embeddings.weight is model.lm_head.weight
    assert sum(p.numel() for p in model.parameters()) == counted_by_hand(flavor)


def test_residual_writes_start_smaller():
    model = built(model_registry("debug"))
    layer = model.layers["0"]
    assert layer.attention.wo.weight.std().item() == pytest.approx(0.02 / 12**0.5, rel=0.1)
    assert layer.attention.qkv_linear.wqkv.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_unknown_flavor_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown flavor 'debugg'; nitp_titan has debug, debug_moe"):
        model_registry("debugg")
