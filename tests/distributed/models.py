"""The models that layouts are compared on; as a job's ``model.module`` too, whose flavors are :data:`MODELS`' names."""

from __future__ import annotations

from torchtitan.protocols.model_spec import ModelSpec

from tests.helpers.decoders import backbone

MODELS = {
    "debug": ("nitp_titan", "debug"),
    "debug_moe": ("nitp_titan", "debug_moe"),
    "llama3": ("llama3", "debugmodel"),
    "qwen3": ("qwen3", "debugmodel"),
    "qwen3_moe": ("qwen3", "debugmodel_moe"),
    "deepseek_v3": ("deepseek_v3", "debugmodel"),
}
BLOCKS = {"qwen3": 4, "qwen3_moe": 2, "deepseek_v3": 4}
"""Fewer than the flavor has: experts in bfloat16 are slow on a CPU."""


def model_registry(flavor: str, attn_backend: str = "flex") -> ModelSpec:
    """Return one of the models, made anew, with no more than its :data:`BLOCKS`."""
    assert attn_backend == "flex", "attention on a CPU has flex attention's masks"
    spec = backbone(*MODELS[flavor])
    spec.model.layers = spec.model.layers[: BLOCKS.get(flavor)]
    return spec
