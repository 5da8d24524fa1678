"""The joint loss: next-token and implicit-token prediction, each over its exact global count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.loss import BaseLoss
from torchtitan.config import CompileConfig

from nitp_titan.nitp.chunked_sum import Implementation
from nitp_titan.nitp.config import CHUNK_TOKENS


class JointLoss(BaseLoss):
    """``NTP + weight * NITP`` (paper eq. 4) from the loss sums that an NITP decoder returns.

    NTP is divided by the step's valid labels, NITP by its valid pairs, over all ranks and micro-batches, so that the
    micro-batches' and ranks' losses add up to the step's. The two parts of a step are kept on the device, since
    TorchTitan's loop (and a pipeline schedule) passes on the total alone.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        weight: float = 1.0
        """Lambda; ``NITPTrainer`` takes it from ``nitp.weight``."""

        chunk_tokens: int = CHUNK_TOKENS
        """Tokens whose logits exist at a time; the projector takes as many as need no more memory."""

        implementation: Implementation = "fast"
        """Of both losses: "fast" takes a chunk's gradients in the forward pass, "reference" computes it twice."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        # What is worth compiling, both terms, is in the decoder.
        self.weight = config.weight
        self._valid_pairs: torch.Tensor | None = None
        self._parts: torch.Tensor | None = None

    def begin_step(self, valid_pairs: torch.Tensor) -> None:
        """Start a step's sums.

        Args:
            valid_pairs: 0-d, the step's NITP pairs on all ranks and in all micro-batches, on the device.
        """
        if self._valid_pairs is None or self._parts is None:
            self._valid_pairs = torch.empty((), dtype=torch.float32, device=valid_pairs.device)
            self._parts = torch.zeros(2, dtype=torch.float32, device=valid_pairs.device)
        # In place: a CUDA graph of the step reads these addresses. A step without a pair has a sum of zero.
        self._valid_pairs.copy_(valid_pairs.clamp(min=1))
        self._parts.zero_()

    @property
    def parts(self) -> torch.Tensor:
        """This rank's share of the step's [NTP, NITP] losses, (2,) fp32: the sum over ranks is the step's."""
        assert self._parts is not None, "begin_step has not been called"
        return self._parts

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Combine the sums of a micro-batch.

        Args:
            pred: (1, 2), the [[NTP, NITP]] sums of an NITP decoder.
            labels: unused; the decoder has had them.
            global_valid_tokens: 0-d, the step's valid labels. In a step without one the NTP loss is zero. None, as in
                validation: both sums are only kept, and the NTP sum is returned.
        """
        sums = pred[0]
        if global_valid_tokens is None:
            self.parts.add_(sums.detach())
            return sums[0], {}
        assert self._valid_pairs is not None, "begin_step has not been called"
        losses = sums / torch.stack([global_valid_tokens.clamp(min=1).to(sums.dtype), self._valid_pairs])
        self.parts.add_(losses.detach())
        return losses[0] + self.weight * losses[1], {}
