"""What the checks of a job need to know of a model, without building it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nitp_titan.job.keys.schema import upstream
from nitp_titan.models.costs import parts_of_shape
from nitp_titan.models.flavors import FLAVORS, Shape
from nitp_titan.models.hf.config_json import computed_by_shape
from nitp_titan.models.hf.families import Computed

OURS = "nitp_titan"


@dataclass(kw_only=True, frozen=True, slots=True)
class ModelFacts:
    """Shape of a decoder, as far as a job file can contradict it."""

    dim: int
    n_layers: int
    n_heads: int | None
    n_kv_heads: int | None
    vocab_size: int
    max_seq_len: int | None
    num_experts: int = 0
    """Routed experts of a block; 0 = dense."""
    top_k: int = 0
    expert_hidden_dim: int | None = None
    """Of a routed expert."""
    head_dim: int | None = None
    """Of queries and keys."""
    hidden_dim: int | None = None
    """Of the dense feed-forward; None where every block has experts."""
    tied: bool = False
    """Whether embedding and unembedding are one matrix."""
    params: int | None = None
    """All parameters, without NITP's projector."""
    computed: Computed | None = None
    """What a Hugging Face folder's config.json is compared with; None where no stock architecture has its weights."""


def modules() -> list[str]:
    """Return the names that ``model.module`` takes, besides dotted paths."""
    return [OURS, *upstream()["models"]]


def flavors(module: str) -> list[str]:
    """Return the flavors of a module of :func:`modules`."""
    return list(FLAVORS) if module == OURS else list(upstream()["models"][module])


def facts(module: str, flavor: str) -> ModelFacts | None:
    """Return the facts of a flavor as it is; None where only an import can tell."""
    if module == OURS:
        return facts_of_shape(FLAVORS[flavor].shape)
    known = upstream()["models"].get(module, {}).get(flavor)
    return ModelFacts(**known) if known else None


def facts_of_shape(shape: Shape) -> ModelFacts:
    """Return the facts of one of our own models."""
    return ModelFacts(
        dim=shape.dim,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        vocab_size=shape.vocab_size,
        max_seq_len=shape.max_seq_len,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        expert_hidden_dim=shape.expert_hidden_dim if shape.num_experts else None,
        head_dim=shape.head_dim,
        hidden_dim=None if shape.num_experts and not shape.n_dense_layers else shape.hidden_dim,
        tied=shape.tie_embeddings,
        params=parts_of_shape(shape).total(),
        computed=computed_by_shape(shape),
    )


def facts_of(config: Any) -> ModelFacts | None:
    """Return the facts of a TorchTitan decoder's configuration; None where it is not one."""
    layers, attention = getattr(config, "layers", None), getattr(config, "first_attention", None)
    if not layers or not hasattr(config, "vocab_size"):
        return None
    dense = next((layer.feed_forward for layer in layers if getattr(layer, "feed_forward", None) is not None), None)
    moe = next((layer.moe for layer in layers if getattr(layer, "moe", None) is not None), None)
    return ModelFacts(
        dim=config.dim,
        n_layers=len(layers),
        n_heads=getattr(attention, "n_heads", None),
        n_kv_heads=getattr(attention, "n_kv_heads", None),
        vocab_size=config.vocab_size,
        max_seq_len=getattr(getattr(attention, "rope", None), "max_seq_len", None),
        num_experts=moe.num_experts if moe is not None else 0,
        top_k=moe.router.top_k if moe is not None else 0,
        expert_hidden_dim=moe.routed_experts.inner_experts.hidden_dim if moe is not None else None,
        head_dim=head_dim_of(attention, config.dim),
        hidden_dim=dense.w1.out_features if dense is not None else None,
        tied=config.enable_weight_tying,
        params=_count(config),
        computed=_computed(config),
    )


def _computed(config: Any) -> Computed | None:
    from nitp_titan.models.hf.architectures import architecture_of
    from nitp_titan.models.hf.config_facts import computed_by

    architecture = architecture_of(config)
    return computed_by(config, architecture.name) if architecture is not None else None


def head_dim_of(attention: Any, dim: int) -> int | None:
    """Return the width of a query of a TorchTitan attention's configuration, in a model of this width."""
    if hasattr(attention, "qk_rope_head_dim"):  # multi-head latent attention
        return attention.qk_nope_head_dim + attention.qk_rope_head_dim
    heads = getattr(attention, "n_heads", None)
    return getattr(attention, "head_dim", None) or (dim // heads if heads else None)


def _count(config: Any) -> int:
    """Build the model on the meta device, where it takes no memory, and count."""
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())
