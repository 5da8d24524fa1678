"""What the checks of a job need to know of a model, without building it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nitp_titan.job.schema import upstream
from nitp_titan.models.flavors import FLAVORS, Flavor

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
    tied: bool = False
    """Whether embedding and unembedding are one matrix."""
    params: int | None = None
    """All parameters, without NITP's projector."""


def modules() -> list[str]:
    """Return the names that ``model.module`` takes, besides dotted paths."""
    return [OURS, *upstream()["models"]]


def flavors(module: str) -> list[str]:
    """Return the flavors of a module of :func:`modules`."""
    return list(FLAVORS) if module == OURS else list(upstream()["models"][module])


def facts(module: str, flavor: str) -> ModelFacts | None:
    """Return the facts of a flavor; None where only an import can tell."""
    if module == OURS:
        return facts_of_flavor(FLAVORS[flavor])
    known = upstream()["models"].get(module, {}).get(flavor)
    return ModelFacts(**known) if known else None


def facts_of_flavor(flavor: Flavor) -> ModelFacts:
    """Return the facts of one of our own flavors."""
    moe = flavor.moe
    return ModelFacts(
        dim=flavor.dim,
        n_layers=flavor.n_layers,
        n_heads=flavor.n_heads,
        n_kv_heads=flavor.n_kv_heads,
        vocab_size=flavor.vocab_size,
        max_seq_len=flavor.max_seq_len,
        num_experts=moe.num_experts if moe else 0,
        top_k=moe.top_k if moe else 0,
        tied=flavor.tie_embeddings,
        params=count_parameters(flavor),
    )


def count_parameters(flavor: Flavor) -> int:
    """Return the number of parameters of one of our flavors, by formula."""
    d, moe = flavor.dim, flavor.moe
    embeddings = flavor.vocab_size * d * (1 if flavor.tie_embeddings else 2)
    # q and output projections, k and v projections, two norms
    attention = 2 * d * flavor.head_dim * (flavor.n_heads + flavor.n_kv_heads) + 2 * d
    n_dense = moe.n_dense_layers if moe else flavor.n_layers
    feed_forward = n_dense * 3 * d * flavor.hidden_dim
    if moe:
        experts = moe.num_experts + moe.num_shared_experts
        router = d * moe.num_experts
        feed_forward += (flavor.n_layers - n_dense) * (3 * d * moe.expert_hidden_dim * experts + router)
    return embeddings + flavor.n_layers * attention + feed_forward + d


def facts_of(config: Any) -> ModelFacts | None:
    """Return the facts of a TorchTitan decoder's configuration; None where it is not one."""
    layers, attention = getattr(config, "layers", None), getattr(config, "first_attention", None)
    if not layers or not hasattr(config, "vocab_size"):
        return None
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
        tied=config.enable_weight_tying,
        params=_count(config),
    )


def _count(config: Any) -> int:
    """Build the model on the meta device, where it takes no memory, and count."""
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())
