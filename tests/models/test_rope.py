"""Rotary positions in real arithmetic turn as TorchTitan's complex ones do."""

from __future__ import annotations

import pytest
import torch
from torchtitan.models.common import ComplexRoPE

from nitp_titan.models.registry import model_registry
from nitp_titan.models.rope import InterleavedRoPE

SEQUENCES, TOKENS, HEADS, KEY_HEADS, HEAD_DIM = 3, 24, 4, 2, 10


def inputs(sequences: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sequences, TOKENS, heads, HEAD_DIM) for heads in (HEADS, KEY_HEADS)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def positions_of(kind: str, sequences: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(1)
    return torch.randint(64, (sequences, TOKENS), generator=generator)


@pytest.mark.parametrize("scaling", ["none", "llama", "yarn"])
@pytest.mark.parametrize(
    ("kind", "sequences"), [("none", SEQUENCES), ("of each sequence", SEQUENCES), ("of each sequence", 1)]
)
def test_turns_as_complex_numbers_do(kind, sequences, scaling):
    options = {"dim": HEAD_DIM, "max_seq_len": 64, "theta": 500.0, "scaling": scaling, "rope_factor": 4.0}
    positions = positions_of(kind, sequences)
    results = []
    for rope in (ComplexRoPE, InterleavedRoPE):
        query, key = inputs(sequences)
        turned = rope.Config(**options).build()(query, key, positions)
        weight = torch.linspace(-1, 1, turned[0].numel()).view(turned[0].shape)
        (turned[0] * weight).sum().add(turned[1].square().sum() * 0.5).add((turned[1] * 3).sum()).backward()
        results.append([*turned, query.grad, key.grad])
    for expected, found in zip(*results, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_keeps_the_dtype_and_computes_in_fp32():
    positions = positions_of("of each sequence", SEQUENCES)
    options = {"dim": HEAD_DIM, "max_seq_len": 64}
    query, key = inputs(SEQUENCES, torch.bfloat16)
    expected = ComplexRoPE.Config(**options).build()(query, key, positions)
    found = InterleavedRoPE.Config(**options).build()(query, key, positions)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        # Both round the same fp32 number but for its last bits.
        assert (a != b).float().mean() < 0.01


def test_compiles_without_complex_numbers():
    rope = InterleavedRoPE.Config(dim=HEAD_DIM, max_seq_len=64).build()
    positions = positions_of("of each sequence", SEQUENCES)
    seen: list[torch.dtype] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]):
        seen.extend(
            node.meta["example_value"].dtype
            for node in graph.graph.nodes
            if "example_value" in node.meta and isinstance(node.meta["example_value"], torch.Tensor)
        )
        return graph.forward

    query, key = inputs(SEQUENCES)
    expected = rope(query, key, positions)
    found = torch.compile(rope, backend=backend, fullgraph=True)(query, key, positions)
    assert seen
    assert not any(dtype.is_complex for dtype in seen)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("flavor", ["debug", "debug_moe"])
def test_every_block_of_the_family_has_it(flavor):
    layers = model_registry(flavor).model.layers
    assert all(type(layer.attention.rope) is InterleavedRoPE.Config for layer in layers)
