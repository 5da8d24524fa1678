"""An unembedding that returns its cross-entropy, a chunk of tokens at a time."""

# Shape suffixes: B = batch, L = sequence, D = model dim, V = vocabulary, T = tokens (B * L flattened)

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from torch.utils.checkpoint import checkpoint
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.models.common.linear import Linear

ChunkLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

Implementation = Literal["fast", "reference"]
"""``eager_sum`` or ``recomputed_sum``."""


class LossHead:
    """Mixin over TorchTitan's ``Linear``: given labels, the sum of their cross-entropies; without, logits as ever.

    The loss is taken inside the module so that FSDP gathers and frees the weight as around any forward, on every torch
    version. Logits come from the unembedding's own ``forward``, a chunk at a time: the whole (B, L, V) never exists.
    """

    chunk_tokens: int
    implementation: Implementation
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
        if self.implementation == "reference" or not h_TD.requires_grad:
            return recomputed_sum(self._chunk_loss, h_TD, labels_T, self.chunk_tokens)
        parameters = list(self.parameters())  # pyrefly: ignore [missing-attribute]
        return eager_sum(self._chunk_loss, h_TD, labels_T, self.chunk_tokens, parameters)

    def _chunk_loss(self, h_TD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        logits_BTV = super().forward(h_TD.unsqueeze(0))  # pyrefly: ignore [missing-attribute]
        return self._cross_entropy(logits_BTV, labels_T.unsqueeze(0))


def _chunks(length: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(start, start + chunk_tokens) for start in range(0, length, chunk_tokens))


def recomputed_sum(
    chunk_loss: ChunkLoss, h_TD: torch.Tensor, labels_T: torch.Tensor, chunk_tokens: int
) -> torch.Tensor:
    """Sum the chunks' losses, making their logits again in the backward pass: plain autograd, and the reference.

    The backward pass reads the module's weight again: FSDP has gathered it by then, since the sum is what the module
    returned.
    """
    total = labels_T.new_zeros((), dtype=torch.float32)
    for chunk in _chunks(labels_T.shape[0], chunk_tokens):
        # Nothing here is random, and a CUDA graph cannot record the reading of the generator's state.
        total = total + checkpoint(
            chunk_loss, h_TD[chunk], labels_T[chunk], use_reentrant=False, preserve_rng_state=False
        )
    return total


def eager_sum(
    chunk_loss: ChunkLoss,
    h_TD: torch.Tensor,
    labels_T: torch.Tensor,
    chunk_tokens: int,
    parameters: list[torch.Tensor],
) -> torch.Tensor:
    """``recomputed_sum`` without the recomputation: a sum's gradients are known in the forward pass, up to a factor.

    Each chunk's backward runs at once, while its logits are there (as in Liger and TorchTitan's chunked loss). The
    weight's gradient is added up in fp32 over the chunks.

    Args:
        parameters: whatever ``chunk_loss`` reads that is to get a gradient.
    """
    return _EagerSum.apply(chunk_loss, h_TD, labels_T, chunk_tokens, *parameters)


class _EagerSum(torch.autograd.Function):
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
        h_grad_TD = torch.empty_like(_local(h_TD))
        grads = [torch.zeros_like(_local(p), dtype=torch.float32) for p in parameters]
        found: list[torch.Tensor] = []
        for chunk in _chunks(labels_T.shape[0], chunk_tokens):
            with torch.enable_grad():
                h = h_TD[chunk].detach().requires_grad_()
                loss = chunk_loss(h, labels_T[chunk])
            found = list(torch.autograd.grad(loss, (h, *parameters)))
            h_grad_TD[chunk] = _local(found[0])
            for grad, part in zip(grads, found[1:], strict=True):
                grad += _local(part)
            total += loss.detach()
        ctx.save_for_backward(h_grad_TD, *grads)
        # Under tensor parallelism gradients may be partial sums: where they lie is the last chunk's as every other's.
        ctx.layouts = [_Layout.of(grad, like) for grad, like in zip(found, (h_TD, *parameters), strict=True)]
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:  # pyrefly: ignore [bad-override]
        pairs = zip(ctx.saved_tensors, ctx.layouts, strict=True)
        h_grad_TD, *grads = (layout.place(grad * grad_output) for grad, layout in pairs)
        return None, h_grad_TD, None, None, *grads


@dataclass(frozen=True)
class _Layout:
    """What a local gradient is to become: a dtype and, for DTensors, placements on a mesh."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()

    @classmethod
    def of(cls, grad: torch.Tensor, like: torch.Tensor) -> _Layout:
        """The layout of a gradient (a chunk's, of a tensor that is cut) with the shape of the whole tensor."""
        if not isinstance(grad, DTensor):
            return cls(like.dtype, like.shape, like.stride())
        return cls(like.dtype, like.shape, like.stride(), grad.device_mesh, tuple(grad.placements))

    def place(self, local: torch.Tensor) -> torch.Tensor:
        local = local.to(self.dtype)
        if self.mesh is None:
            return local
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


def _local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


@functools.cache
def _loss_head_class(base: type[Linear]) -> Any:
    class LossHeadOf(LossHead, base):  # pyrefly: ignore [invalid-inheritance]
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            chunk_tokens: int = 2048
            implementation: Implementation = "fast"

        def __init__(self, config: Any):
            super().__init__(config)
            self.chunk_tokens = config.chunk_tokens
            self.implementation = config.implementation

    LossHeadOf.__name__ = LossHeadOf.__qualname__ = f"LossHead[{base.__name__}]"
    return LossHeadOf


def loss_head_config(
    lm_head: Linear.Config, *, chunk_tokens: int, implementation: Implementation = "fast"
) -> Linear.Config:
    """Return the configuration of ``lm_head``'s twin with a loss; parameters, their names and sharding stay.

    Args:
        lm_head: the unembedding of any TorchTitan decoder.
        chunk_tokens: tokens whose logits exist at a time.
        implementation: "fast" takes gradients in the forward pass, "reference" makes the logits twice.
    """
    values = {f.name: getattr(lm_head, f.name) for f in fields(lm_head)}
    owner = type(lm_head)._owner
    assert owner is not None
    return _loss_head_class(owner).Config(**values, chunk_tokens=chunk_tokens, implementation=implementation)
