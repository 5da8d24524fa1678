"""Small decoders to test with: TorchTitan's debug models and this package's own, and a packed batch for them."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.models.flavors import Shape

STOCK = [
    ("llama3", "debugmodel"),
    ("qwen3", "debugmodel"),
    ("qwen3", "debugmodel_moe"),
    ("deepseek_v3", "debugmodel"),
]
OWN = [("nitp_titan", "debug"), ("nitp_titan", "debug_moe")]

ODD_SHAPES = {
    "dense, tied, heads wider than the model": Shape(
        dim=48, n_layers=5, n_heads=6, n_kv_heads=3, head_dim=10, hidden_dim=100, vocab_size=77, max_seq_len=64,
        tie_embeddings=True,
    ),
    "dense, untied": Shape(
        dim=40, n_layers=2, n_heads=4, n_kv_heads=1, head_dim=6, hidden_dim=33, vocab_size=51, max_seq_len=64
    ),
    "experts, two dense blocks, three shared": Shape(
        dim=48, n_layers=5, n_heads=8, n_kv_heads=2, head_dim=6, hidden_dim=70, vocab_size=90, max_seq_len=64,
        num_experts=7, top_k=3, expert_hidden_dim=20, num_shared_experts=3, n_dense_layers=2,
    ),
    "experts everywhere, none shared, tied": Shape(
        dim=32, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=8, hidden_dim=64, vocab_size=60, max_seq_len=64,
        num_experts=6, top_k=1, expert_hidden_dim=24, tie_embeddings=True,
    ),
}  # fmt: skip
"""Shapes of our family that no flavor has."""


def backbone(module: str, flavor: str) -> ModelSpec:
    """The plain ``ModelSpec`` of a decoder, made anew."""
    if module == "nitp_titan":
        from nitp_titan.models.registry import model_registry

        return model_registry(flavor)
    options = {"attn_backend": "flex"}
    return importlib.import_module(f"torchtitan.models.{module}").model_registry(flavor, **options)


def built(spec: ModelSpec, seed: int = 0) -> torch.nn.Module:
    """The model on the CPU in fp32 with its initial weights."""
    with torch.device("meta"):
        model = spec.model.build()
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    return model


class PackedBatch(NamedTuple):
    """tokens, positions, labels: (B, L)."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


def packed_batch(vocab_size: int, *, documents: tuple[tuple[int, ...], ...] = ((7, 1, 16), (24,)), seed: int = 0):
    """A batch whose rows hold documents of these lengths; a few labels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    tokens = torch.randint(vocab_size, positions.shape, generator=generator)
    labels = torch.randint(vocab_size, positions.shape, generator=generator)
    labels[0, 2] = labels[1, -1] = -100
    return PackedBatch(tokens, positions, labels)
