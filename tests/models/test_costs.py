"""Costs against the paper's figures, matrices listed by hand, real models, counted FLOPs and live bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nitp_titan.models.costs import flops, mtp_flops, nitp_flops, parts_of_shape
from nitp_titan.models.flavors import FLAVORS, Shape
from nitp_titan.models.registry import decoder_config
from nitp_titan.nitp.config import NITPConfig, projector_params
from nitp_titan.nitp.objective import Projector
from tests.helpers.decoders import ODD_SHAPES

PAPER = {  # total and active parameters in billions, PAPER.md section 3
    "0.5B": (0.494, 0.494),
    "2B": (2.10, 2.10),
    "3B": (3.03, 3.03),
    "1.9B-A0.3B": (1.84, 0.289),
    "3B-A0.5B": (3.20, 0.471),
    "9B-A1B": (8.75, 1.062),
    "45B-A5.5B": (44.94, 5.542),
}
SHAPES = {name: flavor.shape for name, flavor in FLAVORS.items()} | ODD_SHAPES


# --- the paper's figures


@pytest.mark.parametrize("name", PAPER)
def test_total_and_active_parameters_are_the_papers(name):
    parts = parts_of_shape(FLAVORS[name].shape)
    assert (parts.total() / 1e9, parts.active() / 1e9) == pytest.approx(PAPER[name], rel=5e-3)


def test_flops_of_9b_are_the_papers():
    shape, nitp = FLAVORS["9B-A1B"].shape, NITPConfig()
    base, added = flops(parts_of_shape(shape), 8192)["paper"], nitp_flops(shape.dim, nitp)
    assert base == 24 * (18 * 1280**2 + 18 * 9 * 1280 * 640) + 6 * 152_064 * 1280
    assert added == 72 * 1280**2 + 18 * 1280
    assert base == pytest.approx(5.06e9, rel=5e-3)
    assert added == pytest.approx(1.18e8, rel=5e-3)
    assert 100 * added / base == pytest.approx(2.3, abs=0.05)


def test_the_papers_formula_counts_a_dense_models_feed_forward_as_one_expert():
    shape = FLAVORS["2B"].shape
    assert flops(parts_of_shape(shape), 1)["paper"] == (28 * (18 * 1792**2 + 18 * 1792 * 10752) + 6 * 152_064 * 1792)


# --- by hand: every matrix of two models that are named nowhere


def test_a_dense_model_by_hand():
    parts = parts_of_shape(ODD_SHAPES["dense, tied, heads wider than the model"])
    block = [(48, 60), (48, 30), (48, 30), (60, 48), (48, 100), (48, 100), (100, 48)]
    matrices = 5 * block + [(48, 77)]
    weights = sum(a * b for a, b in matrices)
    assert parts.by_part() == {
        "embedding": 77 * 48,
        "unembedding": 0,
        "attention": 5 * 48 * (60 + 30 + 30 + 60),
        "feed_forward": 5 * 3 * 48 * 100,
        "router": 0,
        "routed_experts": 0,
        "shared_experts": 0,
        "norms": 5 * 2 * 48 + 48,
    }
    assert parts.total() == parts.active() == weights + 11 * 48
    # Queries of width 60 with keys, then weights with values of all 6 heads: as wide again.
    attention = 5 * 6 * (60 + 60) * 50
    assert flops(parts, 50) == {
        "paper": 5 * (18 * 48**2 + 18 * 48 * 100) + 6 * 77 * 48,
        "exact": 6 * weights,
        "with_attention": 6 * weights + attention,
    }
    head = [*block, (2 * 48, 48), (48, 77)]
    added = 6 * sum(a * b for a, b in head)
    assert mtp_flops(parts, 50) == {
        "paper": 18 * 48**2 + 18 * 48 * 100 + 12 * 48**2 + 6 * 77 * 48,
        "exact": added,
        "with_attention": added + attention // 5,
    }


def test_a_mixture_of_experts_by_hand():
    parts = parts_of_shape(ODD_SHAPES["experts, two dense blocks, three shared"])
    attention = [(48, 48), (48, 12), (48, 12), (48, 48)]
    dense = [(48, 70), (48, 70), (70, 48)]
    expert = [(48, 20), (48, 20), (20, 48)]

    def moe(experts: int) -> list[tuple[int, int]]:
        return [*attention, (48, 7), *(experts * expert)]

    embedding = [(90, 48)]
    stored = 2 * (attention + dense) + 3 * moe(7 + 3) + 2 * embedding
    active = 2 * (attention + dense) + 3 * moe(3 + 3) + 2 * embedding
    norms = 11 * 48
    assert parts.total() == sum(a * b for a, b in stored) + norms
    assert parts.active() == sum(a * b for a, b in active) + norms
    products = sum(a * b for a, b in active) - 90 * 48  # looking up the embedding is no product
    assert flops(parts, 64) == {
        "paper": 5 * (18 * 48**2 + 18 * 6 * 48 * 20) + 6 * 90 * 48,
        "exact": 6 * products,
        "with_attention": 6 * products + 5 * 6 * (48 + 48) * 64,
    }
    head = sum(a * b for a, b in [*moe(3 + 3), (96, 48), (90, 48)])
    assert mtp_flops(parts, 64)["exact"] == 6 * head
    assert mtp_flops(parts, 64)["with_attention"] == 6 * head + 6 * 96 * 64


@pytest.mark.parametrize(
    ("changes", "params", "added"),
    [
        ({}, 12 * 48**2, 72 * 48**2 + 18 * 48),
        ({"projector_ratio": 3}, 9 * 48**2, 54 * 48**2 + 18 * 48),
        ({"projector": "none"}, 0, 18 * 48),
        ({"loss": "generic_cosine"}, 0, 18 * 48),
        ({"enable": False}, 0, 0),
    ],
)
def test_what_nitp_adds(changes, params, added):
    nitp = NITPConfig(**changes)
    assert (projector_params(48, nitp), nitp_flops(48, nitp)) == (params, added)


# --- real models


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_by_part_are_those_of_the_real_model(name):
    shape = SHAPES[name]
    with torch.device("meta"):
        model = decoder_config(shape).build()
    found = dict.fromkeys(parts_of_shape(shape).by_part(), 0)
    for parameter_name, parameter in model.named_parameters():
        words = [word.replace("lm_head", "unembedding") for word in parameter_name.split(".")]
        words = [word.replace("tok_embeddings", "embedding") for word in words]
        [part] = [part for part in found if part in words] or ["norms" if parameter.ndim == 1 else "?"]
        found[part] += parameter.numel()
    assert found == parts_of_shape(shape).by_part()


def counted_flops(shape: Shape, length: int) -> dict[str, int]:
    """FLOPs of a forward pass per token of a real model, by operator."""

    def grouped(a, b, *_, **__):
        return 2 * a[0] * a[1] * b[-1]

    def attention(q, k, v, *_, **__):
        return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])

    mapping = {
        torch.ops.nitp_titan.grouped_mm: grouped,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }
    with torch.device("meta"):
        model = decoder_config(shape).build()
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    tokens = torch.randint(shape.vocab_size, (2, length))
    positions = torch.arange(length).expand(2, length).contiguous()
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, torch.no_grad():
        model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions))
    return {str(op): count / (2 * length) for op, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("name", ["debug", "debug_moe", *ODD_SHAPES])
def test_flops_are_those_that_a_real_model_does(name):
    shape, length = SHAPES[name], 32
    counts = counted_flops(shape, length)
    attention = counts.pop("aten._scaled_dot_product_flash_attention_for_cpu")
    expected = flops(parts_of_shape(shape), length)
    assert 3 * sum(counts.values()) == expected["exact"]
    assert 3 * attention == expected["with_attention"] - expected["exact"]
    assert ("nitp_titan.grouped_mm" in counts) == bool(shape.num_experts)


def test_flops_of_nitp_are_those_that_a_real_projector_does():
    counter = FlopCounterMode(display=False)
    with counter:
        Projector(24, ratio=3)(torch.randn(10, 24))
    assert 3 * counter.get_total_flops() / 10 == nitp_flops(24, NITPConfig(projector_ratio=3)) - 18 * 24
