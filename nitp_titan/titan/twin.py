"""What an NITP twin computes: the decoder's own forward pass, and from it the two loss sums.

    tokens -> blocks 1..k -> z -> blocks k+1..N -> final norm -> h -> unembedding  -> sum of cross-entropies
                                                                 h -> projector -> p, against z shifted left -> NITP sum

Without labels it is the plain backbone, which is what inference sees.
"""

# Shape suffixes: B = batch, L = sequence, D = model dim
# For the NITP loss: S = ranks that share sequences (sequence parallelism; else 1), T = rows that one of them has of all
# sequences, C = those of them that are in a chunk, R = S * C

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from nitp_titan.nitp.chunked_sum import ChunkedSum
from nitp_titan.nitp.dtensors import local_as
from nitp_titan.nitp.objective import nitp_loss
from nitp_titan.nitp.pairs import counted
from nitp_titan.nitp.sequence_shards import SequenceShards
from nitp_titan.titan.tapped_blocks import Tap, TappedBlocks

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder


if TYPE_CHECKING:

    class _Base(Decoder):
        """What a type checker takes the decoder for that the mixin comes before."""

        config: Any
        norm: Any
        lm_head: Any
        tok_embeddings: Any
        layers: Any

else:
    _Base = object


class NITPDecoder(_Base):
    """Mixin over a TorchTitan ``Decoder``; ``nitp_model_spec`` makes the classes that have it."""

    # The decoder's own switch: its forward returns what the unembedding would see.
    _skip_lm_head = True

    nitp_active: bool = True
    """Whether this step has the NITP term; the trainer clears it before ``nitp.start_step``."""

    compile_early: frozenset[bool] = frozenset()
    """Of which passes (with gradients: True, without: False) the next is to compile the NITP branch even if it is
    inactive, rather than one in mid-run."""

    sequence: SequenceShards = SequenceShards()
    """How sequences are spread over ranks; set where the model is parallelized."""

    _nitp_loss: Callable[..., torch.Tensor] = staticmethod(nitp_loss)

    def __init__(self, config: Any):
        super().__init__(config)
        self.layers = TappedBlocks(self.layers)
        self.projector = config.projector.build() if config.projector is not None else None

    def compile_nitp_loss(self, backend: str) -> None:
        """Compile the NITP loss, as TorchTitan does its own (``compile.components`` has "loss")."""
        self._nitp_loss = torch.compile(nitp_loss, backend=backend)

    # The three below read what a pipeline stage has kept of the model; without pipeline parallelism that is all of it.

    @property
    def _has_target(self) -> bool:
        """Whether the residual stream after the target block passes through here: it is what the next block reads."""
        target_layer = self.config.target_layer
        if target_layer == len(self.config.layers):
            return self.norm is not None
        return str(target_layer) in self.layers

    @property
    def receives_target(self) -> bool:
        """Whether the previous pipeline stage sends the target along with the residual stream."""
        if not self.config.nitp.has_target:
            return False
        last = len(self.config.layers)

        after_blocks = last if self.norm is not None else last + 1

        first = 0 if self.tok_embeddings is not None else min(map(int, self.layers), default=after_blocks)
        return first > self.config.target_layer

    @property
    def sends_target(self) -> bool:
        """Whether a later pipeline stage needs the target from here."""
        if self.lm_head is not None or not self.config.nitp.has_target:
            return False
        return self._has_target or self.receives_target

    def forward(
        self,
        tokens: torch.Tensor,
        *args: Any,
        labels: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Map tokens (B, L) to logits (B, L, V), or with ``labels`` (B, L) to the loss sums (1, 2): [[NTP, NITP]].

        Both sums are fp32, over this batch alone: NTP's over valid labels, NITP's over valid pairs (paper eq. 3);
        under context parallelism over this rank's tokens. The NITP sum is zero, and nothing of it is computed, while
        ``nitp_active`` is false (but see ``compile_early``).

        Args:
            args, kwargs: the decoder's own: positions (B, L), attention masks.
            pairs: (B, L) bool, where the NITP loss counts. By default from positions and labels, which under context
                parallelism do not say it.

        A pipeline stage maps the residual stream (B, L, D) of the previous one, and the target (B, L, D) if it
        :attr:`receives_target`, to its own, with the target if it :attr:`sends_target`.

        Raises:
            ValueError: no ``pairs`` under context parallelism.
        """
        target_BLD = None
        if self.receives_target:
            target_BLD, *args = args
        with self._tapped() as tap:
            h_BLD = super().forward(tokens, *args, **kwargs)
        if target_BLD is None:
            # A stage without blocks before the norm, the target being the last block's output: that is its input.
            target_BLD = tap.residual_BLD if tap.residual_BLD is not None else tokens
        if self.lm_head is None:
            return (h_BLD, self._cut(target_BLD)) if self.sends_target else h_BLD
        if labels is None:
            return self.lm_head(h_BLD)

        ntp_sum = self.lm_head(h_BLD, labels=labels)
        if pairs is None:
            if self.sequence.context > 1:
                raise ValueError("pairs: found None, expected a (B, L) mask under context parallelism")
            nitp = self.config.nitp
            pairs = counted(nitp, kwargs.get("positions", args[0] if args else None), labels)
        if self.nitp_active:
            nitp_sum = self._nitp_sum(h_BLD, target_BLD, pairs)
        else:
            if torch.is_grad_enabled() in self.compile_early:
                self._run_in_vain(h_BLD, target_BLD, pairs)
            nitp_sum = torch.zeros_like(ntp_sum)
        self.compile_early -= {torch.is_grad_enabled()}
        # Joined rather than viewed as (1, 2): FSDP hooks into what a module returns.
        return torch.cat([ntp_sum.view(1, 1), nitp_sum.view(1, 1)], dim=1)

    def _tapped(self) -> contextlib.AbstractContextManager[Tap]:
        target_layer = self.config.target_layer
        if isinstance(self.layers, TappedBlocks):
            return self.layers.tapped(target_layer)
        # TorchTitan's pipelining leaves a stage without blocks an empty dictionary of its own.
        return contextlib.nullcontext(Tap(target_layer))

    def _cut(self, target_BLD: torch.Tensor) -> torch.Tensor:
        # Cut early, not in the loss alone: moving a target between ranks has a backward pass of its own.
        return target_BLD.detach() if self.config.nitp.stop_gradient else target_BLD

    def _run_in_vain(self, h_BLD: torch.Tensor, target_BLD: torch.Tensor, mask_BL: torch.Tensor) -> None:
        """Run the NITP branch forward and backward, so that it is compiled, and leave nothing of it."""
        h_BLD, target_BLD = leaves = [x.detach().requires_grad_(x.requires_grad) for x in (h_BLD, target_BLD)]
        nitp_sum = self._nitp_sum(h_BLD, target_BLD, mask_BL)
        if nitp_sum.requires_grad:
            torch.autograd.grad(nitp_sum, [x for x in leaves if x.requires_grad], allow_unused=True)

    def _nitp_sum(self, h_BLD: torch.Tensor, target_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """Return the sum of NITP losses over the pairs of the batch, a chunk of tokens at a time.

        Args:
            h_BLD: whole sequences of this context rank.
            target_BLD: the same, or a part of each where sequence parallelism cuts them.
            mask_BL: (B, L) bool, as ``h_BLD``.
        """
        nitp = self.config.nitp
        if not nitp.has_target:
            return self._nitp_loss(local_as(h_BLD, Replicate()), None, mask_BL, kind=nitp.loss)
        # Under sequence parallelism each rank of the tensor-parallel group takes its part of the sequence.
        shards = self.sequence.tensor
        placement = Shard(1) if shards > 1 else Replicate()
        target_BLD = local_as(self._cut(target_BLD), placement)
        mask_BL = mask_BL.chunk(shards, dim=1)[self.sequence.rank % shards]
        if nitp.shift == 1:
            mask_BL = self.sequence.followed(mask_BL)
            target_of = self.sequence.successors(target_BLD).of
        else:
            target_TD = target_BLD.flatten(0, 1)
            target_of = target_TD.__getitem__
        mask_T = mask_BL.flatten()

        def chunk_loss(h_SCD: torch.Tensor, chunk: slice) -> torch.Tensor:
            h_1RD = h_SCD.flatten(0, 1).unsqueeze(0)
            prediction_1RD = self.projector(h_1RD) if self.projector is not None else h_1RD
            prediction_CD = local_as(prediction_1RD, placement).squeeze(0)
            options = {"kind": nitp.loss, "stop_gradient": nitp.stop_gradient}
            return self._nitp_loss(prediction_CD, target_of(chunk), mask_T[chunk], **options)

        # A chunk has the same rows of every rank's part, so that all ranks of the group have theirs in it.
        h_STD = h_BLD.unflatten(1, (shards, -1)).transpose(0, 1).flatten(1, 2)
        parameters = list(self.projector.parameters()) if self.projector is not None else []
        nitp_sum = self._chunked_sum(target_BLD)(chunk_loss, h_STD, parameters)
        if shards > 1:
            assert isinstance(h_BLD, DTensor)
            nitp_sum = DTensor.from_local(nitp_sum, h_BLD.device_mesh, [Partial()], run_check=False)
            nitp_sum = nitp_sum.redistribute(placements=[Replicate()]).to_local()
        return nitp_sum

    def _chunked_sum(self, target_BLD: torch.Tensor) -> ChunkedSum:
        config: Any = self.config
        # The fast way has gradients of hidden states and weights, not of targets.
        implementation = "reference" if target_BLD.requires_grad else config.lm_head.chunked_sum.implementation
        return ChunkedSum(max(config.projector_tokens // self.sequence.tensor, 1), implementation)
