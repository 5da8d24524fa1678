"""An unembedding that returns its cross-entropy, a chunk of tokens at a time."""

# Shape suffixes: B = batch, L = sequence, D = model dim, V = vocabulary, T = tokens (B * L flattened), C = of a chunk

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.models.common.linear import Linear

from nitp_titan.nitp.chunked_sum import ChunkedSum
from nitp_titan.titan.retyped import retyped

# A type checker takes the mixin for the class that it comes before.
_Base = Linear if TYPE_CHECKING else object


class LossHead(_Base):
    """Mixin over TorchTitan's ``Linear``: given labels, the sum of their cross-entropies; without, logits as ever.

    The loss is taken inside the module so that FSDP gathers and frees the weight as around any forward, on every torch
    version. Logits come from the unembedding's own ``forward``, a chunk at a time: the whole (B, L, V) never exists.
    """

    chunked_sum: ChunkedSum
    _cross_entropy: Callable[..., torch.Tensor] = staticmethod(cross_entropy_loss)

    def compile_loss(self, backend: str) -> None:
        """Compile each chunk's cross-entropy, as TorchTitan does its own (``compile.components`` has "loss")."""
        self._cross_entropy = torch.compile(cross_entropy_loss, backend=backend)

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Map hidden states (B, L, D) to logits (B, L, V), or with ``labels`` (B, L) to the fp32 sum of their losses.

        Labels of ``IGNORE_INDEX`` add nothing. Under tensor parallelism the weight's vocabulary shards stay apart
        (TorchTitan's loss-parallel cross-entropy).
        """
        if labels is None:
            return super().forward(input)
        labels_T = labels.flatten()
        h_1TD = input.flatten(0, 1).unsqueeze(0)

        def loss_of_logits(logits_1CV: torch.Tensor, chunk: slice) -> torch.Tensor:
            return self._cross_entropy(logits_1CV, labels_T[chunk].unsqueeze(0))

        forward: Any = super().forward
        bias, weight_VD = self.bias, self.weight
        if bias is None and forward.__func__ is nn.Linear.forward:
            return self.chunked_sum(loss_of_logits, h_1TD, [], weight_VD=weight_VD)
        # Anything else an unembedding may be: with a cap on its logits, in float8.
        parameters = list(self.parameters())
        return self.chunked_sum(lambda h_1CD, chunk: loss_of_logits(forward(h_1CD), chunk), h_1TD, parameters)


@functools.cache
def _loss_head_class(base: type[Linear]) -> Any:
    class LossHeadOf(LossHead, base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            chunked_sum: ChunkedSum

        def __init__(self, config: Any):
            super().__init__(config)
            self.chunked_sum = config.chunked_sum

    LossHeadOf.__name__ = LossHeadOf.__qualname__ = f"LossHead[{base.__name__}]"
    return LossHeadOf


def loss_head_config(lm_head: Linear.Config, chunked_sum: ChunkedSum) -> Linear.Config:
    """Return the configuration of ``lm_head``'s twin with a loss; parameters, their names and sharding stay.

    Args:
        lm_head: the unembedding of any TorchTitan decoder.
        chunked_sum: how many tokens' logits exist at a time, and whether they are computed once or twice.
    """
    owner = type(lm_head)._owner
    assert owner is not None
    return retyped(lm_head, _loss_head_class(owner).Config, chunked_sum=chunked_sum)
