"""Small decoders to test with: TorchTitan's debug models and this package's own, and a packed batch for them."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torchtitan.protocols.model_spec import ModelSpec

STOCK = [
    ("llama3", "debugmodel"),
    ("qwen3", "debugmodel"),
    ("qwen3", "debugmodel_moe"),
    ("deepseek_v3", "debugmodel"),
]
OWN = [("nitp_titan", "debug"), ("nitp_titan", "debug_moe")]


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
