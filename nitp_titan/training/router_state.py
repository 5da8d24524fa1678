"""What a training step changes in a mixture of experts' routers beside their weights, and how it is taken back."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from nitp_titan.nitp.dtensors import local


class RouterState:
    """The routers' biases and counts of tokens, as they were before a step.

    TorchTitan moves the biases by the counts, and clears these, in a hook that runs whether or not the optimizer's
    step does anything.
    """

    def __init__(self, model_parts: list[nn.Module]):
        self._routed = [m for part in model_parts for m in part.modules() if hasattr(m, "tokens_per_expert_E")]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Note the values before a step."""
        self._kept = [torch.cat(group) for group in self._by_dtype()]

    @torch.no_grad()
    def restore_where(self, skipped: Tensor) -> None:
        """Give all of them back the values that were noted where ``skipped`` (0-d bool) holds, which no host asks."""
        for group, kept in zip(self._by_dtype(), self._kept, strict=True):
            values = torch.where(skipped, kept, torch.cat(group))
            torch._foreach_copy_(group, list(values.split([tensor.numel() for tensor in group])))

    def _by_dtype(self) -> list[list[Tensor]]:
        groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for module in self._routed:
            for tensor in (module.tokens_per_expert_E, getattr(module, "expert_bias_E", None)):
                if tensor is not None:
                    groups[tensor.dtype].append(local(tensor).detach())
        return list(groups.values())
