"""What a model, and NITP on it, costs: parameters and training FLOPs per token.

Plain arithmetic, free of torch. ``nitp-titan report`` and ``nitp-titan check`` print it.

FLOPs are those of training a token: forward and backward, 3 times the forward pass, a multiplication and an addition
being two; recomputation does not count. Three ways (:func:`flops`):

- *paper*: PAPER.md section 6, ``L (18 d^2 + 18 k d d_e) + 6 V d``. Every block counts as a mixture of experts with 4
  key-value heads for 8 query heads. In a dense model k = 1 and d_e is the width of its feed-forward.
- *exact*: 6 x the weights of the matrix products that a token passes, with the real heads, the dense first block, the
  router, ``top_k`` of the experts, the shared experts and the unembedding (tied or not). The embedding is a look-up
  and norms are no products: neither counts.
- *with_attention*: exact, and the products of tokens with tokens at the context length, over the whole square and not
  its causal half: ``6 * L * heads * (width of a key + width of a value) * context``. That is the convention of PaLM's
  MFU and of TorchTitan's, and counts a sequence as one document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nitp_titan.models.flavors import Shape
from nitp_titan.nitp.config import NITPConfig, projector_params

WAYS = ("paper", "exact", "with_attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Parameters of one block by part, and the widths of what it computes for a token."""

    attention: int
    """Weights of the projections around attention."""
    feed_forward: int = 0
    """Weights of a dense feed-forward."""
    router: int = 0
    routed_experts: int = 0
    """All of them."""
    shared_experts: int = 0
    norms: int = 0
    """Norms, and biases where there are any: no matrix products."""

    num_experts: int = 0
    top_k: int = 0
    heads: int = 0
    """Query heads; 0 in a block without products of tokens with tokens."""
    query: int = 0
    """Width of all queries together."""
    key: int = 0
    value: int = 0
    attended: int = 0
    """Width of all heads' outputs together."""

    def params(self) -> int:
        """All parameters."""
        return self.dense_params() + self.routed_experts

    def dense_params(self) -> int:
        """Parameters besides the routed experts'."""
        return self.attention + self.feed_forward + self.router + self.shared_experts + self.norms

    def active_experts(self) -> int:
        """Weights of the experts that one token is routed to."""
        return self.routed_experts // self.num_experts * self.top_k if self.num_experts else 0

    def products(self) -> int:
        """Weights of the matrix products that one token passes."""
        return self.attention + self.feed_forward + self.router + self.shared_experts + self.active_experts()

    def attention_flops(self, context: int) -> int:
        """Training FLOPs of a token with the tokens of its context."""
        return 6 * (self.query + self.attended) * context


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A decoder, as far as its costs depend on it."""

    dim: int
    vocab_size: int
    tied: bool
    blocks: tuple[Block, ...]
    final_norm: int
    other: int = 0
    """Parameters of anything else, a vision tower say; no token passes them."""
    shape: Shape | None = None
    """One of our own models'."""

    def by_part(self) -> dict[str, int]:
        """Return the parameters by part; ``unembedding`` is 0 where it is the embedding's matrix."""
        table = self.vocab_size * self.dim
        names = ("attention", "feed_forward", "router", "routed_experts", "shared_experts", "norms")
        parts = {name: sum(getattr(block, name) for block in self.blocks) for name in names}
        parts["norms"] += self.final_norm
        parts = {"embedding": table, "unembedding": 0 if self.tied else table, **parts}
        return parts | ({"other": self.other} if self.other else {})

    def total(self) -> int:
        """All parameters of the model that leaves, which has no projector."""
        return sum(self.by_part().values())

    def active(self) -> int:
        """Parameters that work on one token: ``top_k`` of the experts, and all else, both embeddings included."""
        return self.total() - sum(block.routed_experts - block.active_experts() for block in self.blocks)


def parts_of_shape(shape: Shape) -> Parts:
    """Return the parts of one of our own models."""
    d, head = shape.dim, shape.head_dim
    query, key = shape.n_heads * head, shape.n_kv_heads * head
    common: dict[str, Any] = {
        "attention": d * (query + 2 * key) + query * d,
        "norms": 2 * d,
        "heads": shape.n_heads,
        "query": query,
        "key": key,
        "value": key,
        "attended": query,
    }
    dense = Block(feed_forward=3 * d * shape.hidden_dim, **common)
    expert = 3 * d * shape.expert_hidden_dim
    moe = Block(
        router=d * shape.num_experts,
        routed_experts=shape.num_experts * expert,
        shared_experts=shape.num_shared_experts * expert,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        **common,
    )
    n_moe = shape.moe_layers()
    return Parts(
        dim=d,
        vocab_size=shape.vocab_size,
        tied=shape.tie_embeddings,
        blocks=(dense,) * (shape.n_layers - n_moe) + (moe,) * n_moe,
        final_norm=d,
        shape=shape,
    )


def nitp_flops(dim: int, nitp: NITPConfig) -> int:
    """Return what NITP adds to a token: the projector, and ``18 d`` for the loss (72 d^2 + 18 d for ratio 4)."""
    return 6 * projector_params(dim, nitp) + 18 * dim if nitp.enable else 0


def flops(parts: Parts, context: int) -> dict[str, int | None]:
    """Return the training FLOPs of a token in the three ways; "paper" is None but for our own models.

    Args:
        context: tokens of a sequence.
    """
    exact = sum(6 * block.products() for block in parts.blocks) + _unembedding_flops(parts)
    paper = None
    if parts.shape is not None:
        paper = parts.shape.n_layers * _paper_block_flops(parts.shape) + _unembedding_flops(parts)
    attention = sum(block.attention_flops(context) for block in parts.blocks)
    return {"paper": paper, "exact": exact, "with_attention": exact + attention}


def mtp_flops(parts: Parts, context: int) -> dict[str, int | None]:
    """Return what a multi-token-prediction head of depth 1 (DeepSeek-V3's) would add to a token, in the three ways.

    One more block of the model's last kind, the 2 d x d projection that fuses hidden state and next embedding, and the
    unembedding once more (its weights are shared, its products are not).
    """
    last = parts.blocks[-1]
    rest = 6 * 2 * parts.dim**2 + _unembedding_flops(parts)
    exact = 6 * last.products() + rest
    paper = _paper_block_flops(parts.shape) + rest if parts.shape is not None else None
    return {"paper": paper, "exact": exact, "with_attention": exact + last.attention_flops(context)}


def _unembedding_flops(parts: Parts) -> int:
    return 6 * parts.vocab_size * parts.dim


def _paper_block_flops(shape: Shape) -> int:
    if shape.num_experts:
        k, width = shape.top_k + shape.num_shared_experts, shape.expert_hidden_dim
    else:
        k, width = 1, shape.hidden_dim
    return 18 * shape.dim**2 + 18 * k * shape.dim * width
