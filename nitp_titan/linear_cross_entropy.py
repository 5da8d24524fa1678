"""An unembedding that returns its cross-entropy, a chunk of tokens at a time."""

# Shape suffixes: B = batch, L = sequence, D = model dim, V = vocabulary, T = tokens (B * L flattened)

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.models.common.linear import Linear


class LossHead:
    """Mixin over TorchTitan's ``Linear``: given labels, the sum of their cross-entropies; without, logits as ever.

    The loss is taken inside the module so that FSDP gathers and frees the weight as around any forward, on every torch
    version. Each chunk's logits are made again in the backward pass: the whole (B, L, V) exists in neither.
    """

    chunk_tokens: int
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
            return super().forward(input)  # pyrefly: ignore [missing-attribute]
        h_TD, labels_T = input.flatten(0, 1), labels.flatten()
        total = labels.new_zeros((), dtype=torch.float32)
        for start in range(0, labels_T.shape[0], self.chunk_tokens):
            chunk = slice(start, start + self.chunk_tokens)
            # Nothing here is random, and a CUDA graph cannot record the reading of the generator's state.
            total = total + checkpoint(
                self._chunk_loss, h_TD[chunk], labels_T[chunk], use_reentrant=False, preserve_rng_state=False
            )
        return total

    def _chunk_loss(self, h_TD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        logits_TV = F.linear(h_TD, self.weight, self.bias)  # pyrefly: ignore [missing-attribute]
        return self._cross_entropy(logits_TV.unsqueeze(0), labels_T.unsqueeze(0))


@functools.cache
def _loss_head_class(base: type[Linear]) -> Any:
    class LossHeadOf(LossHead, base):  # pyrefly: ignore [invalid-inheritance]
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            chunk_tokens: int = 2048

        def __init__(self, config: Any):
            super().__init__(config)
            self.chunk_tokens = config.chunk_tokens

    LossHeadOf.__name__ = LossHeadOf.__qualname__ = f"LossHead[{base.__name__}]"
    return LossHeadOf


def loss_head_config(lm_head: Linear.Config, *, chunk_tokens: int) -> Linear.Config:
    """Return the configuration of ``lm_head``'s twin with a loss; parameters, their names and sharding stay.

    Args:
        lm_head: the unembedding of any TorchTitan decoder.
        chunk_tokens: tokens whose logits exist at a time.
    """
    values = {f.name: getattr(lm_head, f.name) for f in fields(lm_head)}
    owner = type(lm_head)._owner
    assert owner is not None
    return _loss_head_class(owner).Config(**values, chunk_tokens=chunk_tokens)
