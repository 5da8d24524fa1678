"""The sum of a loss over the rows of a tensor, a chunk at a time: what a chunk computes never exists for all rows.

Logits of a vocabulary are what this is for, and the inner activations of NITP's projector.
"""

# Shape suffixes: S = shards of the sequence (1 without), T = rows (tokens), C = rows of a chunk, D = model dim,
# V = outputs of a linear map (the vocabulary)

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from torch.utils.checkpoint import checkpoint

from nitp_titan.nitp.dtensors import local
from nitp_titan.nitp.weight_gradient import WeightGradient

ChunkLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""(rows of h, or their images; which they are) -> their loss, 0-d. It sees to all else that belongs to these rows."""

Implementation = Literal["fast", "reference"]
"""``eager_sum`` or ``recomputed_sum``."""


@dataclass(frozen=True, slots=True)
class ChunkedSum:
    """How a sum is taken."""

    chunk_tokens: int
    """Rows of a chunk, at most."""

    implementation: Implementation = "fast"
    """"fast" takes a chunk's gradients in the forward pass, "reference" computes the chunk twice."""

    def __call__(
        self,
        chunk_loss: ChunkLoss,
        h_STD: torch.Tensor,
        parameters: list[torch.Tensor],
        *,
        weight_VD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum ``chunk_loss`` over the rows of ``h_STD``; 0-d, fp32 (float64 if the losses are).

        Args:
            h_STD: (S, T, D), cut along T. Differentiable, as the sum is: once, where "fast".
            parameters: all that ``chunk_loss`` reads and that may get a gradient; "fast" gives none to others.
            weight_VD: of a linear map without a bias. ``chunk_loss`` is then given its images (S, C, V) in the rows'
                place, and "fast" adds up the weight's gradient as :mod:`nitp_titan.nitp.weight_gradient` says.
        """
        if self.implementation == "reference" or not (torch.is_grad_enabled() and h_STD.requires_grad):
            if weight_VD is not None:
                chunk_loss = _after(lambda h_SCD: F.linear(h_SCD, weight_VD), chunk_loss)
            return recomputed_sum(chunk_loss, h_STD, self.chunk_tokens)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return eager_sum(chunk_loss, h_STD, self.chunk_tokens, trained, weight_VD)


def _after(function: Callable[[torch.Tensor], torch.Tensor], chunk_loss: ChunkLoss) -> ChunkLoss:
    return lambda h_SCD, chunk: chunk_loss(function(h_SCD), chunk)


def chunks(length: int, chunk_tokens: int) -> list[slice]:
    """Cut rows into chunks of at most ``chunk_tokens``, where that can be of multiples of 16, as float8 products need.

    Equal ones, if up to twice as many are: a chunk of another size is compiled once more, and its products are slower.
    """
    assert length > 0, "a batch without tokens"
    unit = math.gcd(length, 16)
    if unit > chunk_tokens:
        unit = 1
    units, most = length // unit, chunk_tokens // unit
    fewest = -(-units // most)
    number = next((n for n in range(fewest, 2 * fewest) if units % n == 0), fewest)
    size = -(-units // number) * unit
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def recomputed_sum(chunk_loss: ChunkLoss, h_STD: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
    """Sum the chunks' losses, computing each once more in the backward pass: plain autograd, and the reference.

    The backward pass reads the module's weights again: FSDP has gathered them by then, since the sum is what the module
    returned.
    """
    total = torch.zeros((), dtype=torch.float32, device=h_STD.device)
    for chunk in chunks(h_STD.shape[1], chunk_tokens):
        if torch.is_grad_enabled():
            # Nothing here is random, and a CUDA graph cannot record the reading of the generator's state.
            options: Any = {"use_reentrant": False, "preserve_rng_state": False}
            total = total + checkpoint(chunk_loss, h_STD[:, chunk], chunk, **options)
        else:
            total = total + chunk_loss(h_STD[:, chunk], chunk)
    return total


def eager_sum(
    chunk_loss: ChunkLoss,
    h_STD: torch.Tensor,
    chunk_tokens: int,
    parameters: list[torch.Tensor],
    weight_VD: torch.Tensor | None = None,
) -> torch.Tensor:
    """``recomputed_sum`` without the recomputation: a sum's gradients are known in the forward pass, up to a factor.

    Each chunk's backward runs at once, while its activations are there (as in Liger and TorchTitan's chunked loss).
    Gradients of parameters are added up in fp32 over the chunks. Hooks of a parameter see each chunk's gradient, and
    then their sum; those of ``weight_VD`` the sum alone.

    Raises:
        RuntimeError: in the backward pass, if that is to be differentiated.
    """
    return _EagerSum.apply(chunk_loss, h_STD, chunk_tokens, weight_VD, *parameters)


class _EagerSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chunk_loss: ChunkLoss,
        h_STD: torch.Tensor,
        chunk_tokens: int,
        weight_VD: torch.Tensor | None,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=h_STD.device)
        h_grad_STD = torch.empty_like(local(h_STD))
        grads: list[torch.Tensor] = []
        ctx.layouts = []
        pieces = chunks(h_STD.shape[1], chunk_tokens)
        weight_gradient = None
        if weight_VD is not None:
            weight_gradient = WeightGradient(weight_VD, chunks=len(pieces))
            chunk_loss = _after(weight_gradient.linear, chunk_loss)
        for chunk in pieces:
            with torch.enable_grad():
                h = h_STD[:, chunk].detach().requires_grad_()
                loss = chunk_loss(h, chunk)
            found = torch.autograd.grad(loss, (h, *parameters))
            # Under tensor parallelism gradients may be partial sums.
            layouts = [_Layout.of(grad, like) for grad, like in zip(found, (h_STD, *parameters), strict=True)]
            assert ctx.layouts in ([], layouts), "a chunk's gradients lie elsewhere than the last one's"
            ctx.layouts = layouts
            h_part, *parts = map(local, found)
            h_grad_STD[:, chunk] = h_part
            if len(pieces) == 1:
                grads = parts
            elif not grads:
                # Copies, to be added to: parameters may share what autograd has returned.
                grads = [part.to(torch.promote_types(part.dtype, torch.float32), copy=True) for part in parts]
            else:
                torch._foreach_add_(grads, parts)
            total = total + loss.detach()
            # Not under the next chunk's activations.
            del h, loss, found, h_part, parts
        ctx.has_weight = weight_gradient is not None and weight_gradient.total is not None
        if ctx.has_weight:
            grads.append(weight_gradient.total)
            ctx.layouts.append(_Layout.of(weight_VD, weight_VD))
        ctx.save_for_backward(h_grad_STD, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                'create_graph: this loss has no second derivatives; with loss.implementation = "reference" it has'
            )
        pairs = zip(ctx.saved_tensors, ctx.layouts, strict=True)
        h_grad_STD, *grads = (layout.place(grad, grad_output) for grad, layout in pairs)
        weight_grad_VD = grads.pop() if ctx.has_weight else None
        return None, h_grad_STD, None, weight_grad_VD, *grads


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

    def place(self, part: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Return the gradient, times a factor."""
        # Cast as it is written, without a copy in fp32.
        scaled = torch.mul(part, factor, out=torch.empty_like(part, dtype=self.dtype))
        if self.mesh is None:
            return scaled
        return DTensor.from_local(
            scaled, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )
