"""The sum of a loss over the rows of a tensor, a chunk at a time: what a chunk computes never exists for all rows.

Logits of a vocabulary are what this is for, and the inner activations of NITP's projector.
"""

# Shape suffixes: S = shards of the sequence (1 without), T = rows (tokens), D = model dim

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from torch.utils.checkpoint import checkpoint

ChunkLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""(rows of h, which they are) -> their loss, 0-d. It sees to everything else that belongs to these rows."""

Implementation = Literal["fast", "reference"]
"""``eager_sum`` or ``recomputed_sum``."""


@dataclass(frozen=True, slots=True)
class ChunkedSum:
    """How a sum is taken."""

    chunk_tokens: int
    """Rows of a chunk, at most."""

    implementation: Implementation = "fast"
    """"fast" takes a chunk's gradients in the forward pass, "reference" computes the chunk twice."""

    def __call__(self, chunk_loss: ChunkLoss, h_STD: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
        """Sum ``chunk_loss`` over the rows of ``h_STD``; 0-d, fp32 (float64 if the losses are).

        Args:
            h_STD: (S, T, D), cut along T. Differentiable, as the sum is.
            parameters: all else that ``chunk_loss`` reads and that may get a gradient.
        """
        if self.implementation == "reference" or not (torch.is_grad_enabled() and h_STD.requires_grad):
            return recomputed_sum(chunk_loss, h_STD, self.chunk_tokens)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return eager_sum(chunk_loss, h_STD, self.chunk_tokens, trained)


def chunks(length: int, chunk_tokens: int) -> list[slice]:
    """Cut rows into chunks of at most ``chunk_tokens``.

    Equal ones, if up to twice as many are: a chunk of another size is compiled once more, and its products are slower.
    """
    fewest = -(-length // chunk_tokens)
    number = next((n for n in range(fewest, 2 * fewest) if length % n == 0), fewest)
    size = -(-length // number)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def recomputed_sum(chunk_loss: ChunkLoss, h_STD: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
    """Sum the chunks' losses, computing each once more in the backward pass: plain autograd, and the reference.

    The backward pass reads the module's weights again: FSDP has gathered them by then, since the sum is what the module
    returned.
    """
    total = torch.zeros((), dtype=torch.float32, device=h_STD.device)
    for chunk in chunks(h_STD.shape[1], chunk_tokens):
        # Nothing here is random, and a CUDA graph cannot record the reading of the generator's state.
        total = total + checkpoint(chunk_loss, h_STD[:, chunk], chunk, use_reentrant=False, preserve_rng_state=False)
    return total


def eager_sum(
    chunk_loss: ChunkLoss, h_STD: torch.Tensor, chunk_tokens: int, parameters: list[torch.Tensor]
) -> torch.Tensor:
    """``recomputed_sum`` without the recomputation: a sum's gradients are known in the forward pass, up to a factor.

    Each chunk's backward runs at once, while its activations are there (as in Liger and TorchTitan's chunked loss).
    Gradients of parameters are added up in fp32 over the chunks.
    """
    return _EagerSum.apply(chunk_loss, h_STD, chunk_tokens, *parameters)


class _EagerSum(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore [bad-override]
        ctx: Any, chunk_loss: ChunkLoss, h_STD: torch.Tensor, chunk_tokens: int, *parameters: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=h_STD.device)
        h_grad_STD = torch.empty_like(_local(h_STD))
        grads: list[torch.Tensor] = []
        found: list[torch.Tensor] = []
        for chunk in chunks(h_STD.shape[1], chunk_tokens):
            with torch.enable_grad():
                h = h_STD[:, chunk].detach().requires_grad_()
                loss = chunk_loss(h, chunk)
            found = list(torch.autograd.grad(loss, (h, *parameters)))
            h_grad_STD[:, chunk] = _local(found[0])
            parts = [_local(part) for part in found[1:]]
            if h_STD.shape[1] <= chunk_tokens:
                grads = parts
            elif not grads:
                grads = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
            else:
                torch._foreach_add_(grads, parts)
            total = total + loss.detach()
        ctx.save_for_backward(h_grad_STD, *grads)
        # Under tensor parallelism gradients may be partial sums: where they lie is the last chunk's as every other's.
        ctx.layouts = [_Layout.of(grad, like) for grad, like in zip(found, (h_STD, *parameters), strict=True)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:  # pyrefly: ignore [bad-override]
        pairs = zip(ctx.saved_tensors, ctx.layouts, strict=True)
        h_grad_STD, *grads = (layout.place(grad * grad_output) for grad, layout in pairs)
        return None, h_grad_STD, None, *grads


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
