"""An unembedding that returns its cross-entropy, a chunk of tokens at a time."""

# Shape suffixes: B = batch, L = sequence, D = model dim, V = vocabulary, T = tokens (B * L flattened)

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.models.common.linear import Linear

ChunkLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LossHead:
    """Mixin over TorchTitan's ``Linear``: given labels, the sum of their cross-entropies; without, logits as ever.

    The loss is taken inside the module so that FSDP gathers and frees the weight as around any forward, on every torch
    version. Logits come from the unembedding's own ``forward``, a chunk at a time: the whole (B, L, V) never exists.
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
        if isinstance(h_TD, DTensor) or not h_TD.requires_grad:
            return recomputed_sum(self._chunk_loss, h_TD, labels_T, self.chunk_tokens)
        parameters = list(self.parameters())  # pyrefly: ignore [missing-attribute]
        return _EagerSum.apply(self._chunk_loss, h_TD, labels_T, self.chunk_tokens, *parameters)

    def _chunk_loss(self, h_TD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        logits_BTV = super().forward(h_TD.unsqueeze(0))  # pyrefly: ignore [missing-attribute]
        return self._cross_entropy(logits_BTV, labels_T.unsqueeze(0))


def _chunks(length: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(start, start + chunk_tokens) for start in range(0, length, chunk_tokens))


def recomputed_sum(
    chunk_loss: ChunkLoss, h_TD: torch.Tensor, labels_T: torch.Tensor, chunk_tokens: int
) -> torch.Tensor:
    """Sum the chunks' losses, making their logits again in the backward pass: plain autograd, and the reference.

    Also for DTensors, whose partial gradients autograd knows how to add. The backward pass reads the module's weight
    again: FSDP has gathered it by then, since the sum is what the module returned.
    """
    total = labels_T.new_zeros((), dtype=torch.float32)
    for chunk in _chunks(labels_T.shape[0], chunk_tokens):
        # Nothing here is random, and a CUDA graph cannot record the reading of the generator's state.
        total = total + checkpoint(
            chunk_loss, h_TD[chunk], labels_T[chunk], use_reentrant=False, preserve_rng_state=False
        )
    return total


class _EagerSum(torch.autograd.Function):
    """``recomputed_sum`` without the recomputation: a sum's gradients are known in the forward pass, up to a factor.

    Each chunk's backward runs at once, while its logits are there (as in Liger and TorchTitan's chunked loss). The
    weight's gradient is added up in fp32 over the chunks.
    """

    @staticmethod
    def forward(  # pyrefly: ignore [bad-override]
        ctx: Any,
        chunk_loss: ChunkLoss,
        h_TD: torch.Tensor,
        labels_T: torch.Tensor,
        chunk_tokens: int,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        total = labels_T.new_zeros((), dtype=torch.float32)
        h_grad_TD = torch.empty_like(h_TD)
        grads = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for chunk in _chunks(labels_T.shape[0], chunk_tokens):
            with torch.enable_grad():
                h = h_TD[chunk].detach().requires_grad_()
                loss = chunk_loss(h, labels_T[chunk])
            h_grad_TD[chunk], *found = torch.autograd.grad(loss, (h, *parameters))
            for grad, part in zip(grads, found, strict=True):
                grad += part
            total += loss.detach()
        ctx.save_for_backward(h_grad_TD, *grads)
        ctx.dtypes = [p.dtype for p in parameters]
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:  # pyrefly: ignore [bad-override]
        h_grad_TD, *grads = ctx.saved_tensors
        scaled = [(grad * grad_output).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
        return None, (h_grad_TD * grad_output).to(h_grad_TD.dtype), None, None, *scaled


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
