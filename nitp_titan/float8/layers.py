"""The layers that float8 is about: their sizes and names, and for a model of ours all of them without building it.

Free of torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nitp_titan.float8.config import AUTO_FILTER, Float8Config
from nitp_titan.models.flavors import Shape
from nitp_titan.nitp.config import CHUNK_TOKENS, NITPConfig, has_projector

MULTIPLE = 16
"""What every dimension of a float8 product must be a multiple of."""

# How TorchTitan's decoders shard a linear over tensor parallelism, by the last part of its name: these by input
# features, these not at all, all others by output features.
_SHARDED_BY_INPUT = ("wo", "w2")
_NOT_SHARDED = ("wq_a", "wkv_a", "gate")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearLayer:
    """A linear layer of a model."""

    name: str
    in_features: int
    out_features: int
    special: bool = False
    """Whether its class multiplies in a way of its own."""
    at_most: int | None = None
    """Tokens that it takes at a time; None = all of a micro-batch."""

    def local(self, tensor_parallel: int) -> tuple[int, int]:
        """Return (K, N): the input and output features that one rank multiplies."""
        last = self.name.rsplit(".", 1)[-1]
        if last in _NOT_SHARDED:
            return self.in_features, self.out_features
        if last in _SHARDED_BY_INPUT:
            return self.in_features // tensor_parallel, self.out_features
        return self.in_features, self.out_features // tensor_parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedExperts:
    """The routed experts of a block: gate, up and down projections in grouped products."""

    name: str
    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int

    def local(self, tokens: int, *, tensor_parallel: int, expert_parallel: int) -> tuple[int, int, int, int]:
        """Return (M, D, H, G) of one rank, if all experts get as many tokens: routed tokens, dim, hidden dim, experts.

        Expert parallelism takes the ranks of tensor parallelism along; without it, that splits each expert.
        """
        if expert_parallel > 1:
            routed = tokens * self.top_k // tensor_parallel
            return routed, self.dim, self.hidden_dim, self.num_experts // expert_parallel
        return tokens * self.top_k, self.dim, self.hidden_dim // tensor_parallel, self.num_experts


def tokens_at_a_time(sequences: int, seq_len: int, *, context: int, pipeline: int, microbatch: int) -> int:
    """Return the tokens that a rank has at a time.

    Args:
        sequences: a rank's local batch size.
        context: degree of context parallelism.
        pipeline: degree of pipeline parallelism.
        microbatch: sequences of a pipeline's micro-batch.
    """
    return (microbatch if pipeline > 1 else sequences) * seq_len // context


def experts_problem(dim: int, hidden_dim: int) -> str:
    """Return why routed experts of this shape cannot be float8, or ""."""
    wrong = [str(size) for size in (dim, hidden_dim) if size % MULTIPLE]
    return f"the experts' {' and '.join(wrong)} should be a multiple of {MULTIPLE}" if wrong else ""


def unmatched(config: Float8Config, layers: Iterable[LinearLayer]) -> Iterator[tuple[str, str]]:
    """Yield (word of ``filter_fqns`` that is in no layer's name, nearest part of one or "")."""
    # The projector's also where NITP is off, so that one file serves both sides of a comparison.
    names = [*(layer.name for layer in layers), *(f"projector.w{part}" for part in (1, 2, 3))]
    words = [word for word in config.filter_fqns if word != AUTO_FILTER]
    yield from in_no_name(words, names, near=[AUTO_FILTER])


def in_no_name(words: Iterable[str], names: Sequence[str], *, near: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield (word that is part of no layer's name, nearest part of one, or of ``near``, or "")."""
    known = dict.fromkeys(near)
    for name in names:
        parts = [part for part in name.split(".") if not part.isdigit()]
        known |= dict.fromkeys([*parts, *(".".join(pair) for pair in pairwise(parts))])
    for word in words:
        if not any(word in name for name in names):
            nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
            yield word, nearest[0] if nearest else ""


def layers_of_shape(shape: Shape, nitp: NITPConfig, *, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[LinearLayer]:
    """Yield the linear layers of a model of ours and of NITP's projector.

    Args:
        chunk_tokens: of the loss.
    """
    d, heads = shape.dim, shape.n_heads * shape.head_dim
    yield _layer("lm_head", d, shape.vocab_size)
    for index in range(shape.n_layers):
        block = f"layers.{index}"
        yield _layer(f"{block}.attention.qkv_linear.wqkv", d, heads + 2 * shape.n_kv_heads * shape.head_dim)
        yield _layer(f"{block}.attention.wo", heads, d)
        if index < shape.n_layers - shape.moe_layers():
            yield from _feed_forward(f"{block}.feed_forward", d, shape.hidden_dim)
            continue
        yield _layer(f"{block}.moe.router.gate", d, shape.num_experts)
        if shape.num_shared_experts:
            width = shape.expert_hidden_dim * shape.num_shared_experts
            yield from _feed_forward(f"{block}.moe.shared_experts", d, width)
    if has_projector(nitp):
        at_most = nitp.projector_tokens(chunk_tokens, dim=d, vocab_size=shape.vocab_size)
        for layer in _feed_forward("projector", d, nitp.projector_ratio * d):
            yield dataclasses.replace(layer, at_most=at_most)


def experts_of_shape(shape: Shape) -> Iterator[RoutedExperts]:
    """Yield the routed experts of a model of ours, a block's at a time."""
    for index in range(shape.n_layers - shape.moe_layers(), shape.n_layers):
        yield RoutedExperts(
            name=f"layers.{index}.moe.routed_experts",
            dim=shape.dim,
            hidden_dim=shape.expert_hidden_dim,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
        )


def _layer(name: str, in_features: int, out_features: int) -> LinearLayer:
    return LinearLayer(name=name, in_features=in_features, out_features=out_features)


def _feed_forward(name: str, dim: int, hidden: int) -> Iterator[LinearLayer]:
    for part in ("w1", "w3"):
        yield _layer(f"{name}.{part}", dim, hidden)
    yield _layer(f"{name}.w2", hidden, dim)
