"""What the trainer reads off the model on some steps without touching its computation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils as tools

from nitp_titan.nitp.dtensors import local
from nitp_titan.nitp.geometry import GeometryStatistics
from nitp_titan.runs.tags import EFFECTIVE_RANK, MAX_LOAD, MEAN_COSINE
from nitp_titan.training.hooks import Hook, Moment

Log = Callable[[int, dict[str, float]], None]
"""(step, metrics) -> logged."""


class HiddenStateGeometry(Hook):
    """Effective rank and mean cosine similarity of a step's last hidden states (paper section 5).

    Over the valid tokens of all micro-batches and data-parallel ranks: no sampling, so that every layout of the same
    batch measures the same. The states are read behind the final norm, where the unembedding sees them.
    """

    def __init__(self, parallel_dims: ParallelDims, freq: int = 0, log: Log | None = None):
        """Observe every ``freq`` steps, 0 = none.

        Args:
            log: is given what :meth:`take` has of a step that was observed and whose metrics were not logged.
        """
        self._parallel_dims, self._freq, self._log = parallel_dims, freq, log
        self._of_step = contextlib.ExitStack()
        self._observing = False
        self._valid_BL: list[torch.Tensor] = []
        self._statistics: GeometryStatistics | None = None

    def begin_step(self, moment: Moment) -> None:
        observed = bool(self._freq) and moment.step % self._freq == 0
        self._of_step.enter_context(self.observing(moment.model_parts if observed else []))

    def end_step(self, moment: Moment) -> None:
        self._of_step.close()
        if (geometry := self.take()) and self._log is not None:
            self._log(moment.step, geometry)

    def close(self, moment: Moment) -> None:
        self._of_step.close()

    @contextlib.contextmanager
    def observing(self, model_parts: list[nn.Module]) -> Iterator[None]:
        """Inside, the forward passes of the parts that have a final norm are observed; of no parts, none are."""
        self._statistics = None
        norms = [part.norm for part in model_parts if isinstance(getattr(part, "norm", None), nn.Module)]
        hooks = [norm.register_forward_hook(self._observe) for norm in norms]
        self._observing = bool(hooks)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._observing = False
            self._valid_BL.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, forward passes are not observed."""
        observing, self._observing = self._observing, False
        try:
            yield
        finally:
            self._observing = observing

    def expect(self, labels_BL: torch.Tensor) -> None:
        """Announce the labels (B, L) of the next forward pass: tokens whose label is ignored do not count."""
        if self._observing:
            self._valid_BL.append(labels_BL != IGNORE_INDEX)

    def _observe(self, module: nn.Module, args: Any, h_BLD: torch.Tensor) -> None:
        if not self._observing:
            return
        h_BLD = h_BLD.detach()
        if isinstance(h_BLD, DTensor):
            h_BLD = h_BLD.full_tensor()
        if self._statistics is None:
            self._statistics = GeometryStatistics(h_BLD.shape[-1], h_BLD.device)
        self._statistics.update(h_BLD, self._valid_BL.pop(0))

    def take(self) -> dict[str, float]:
        """Return and forget what was observed, reduced over the ranks that hold parts of the batch.

        {} if nothing was, and of a step with fewer than two tokens that count, which have no geometry.
        """
        statistics, self._statistics = self._statistics, None
        if statistics is None:
            return {}
        mesh = self._parallel_dims.get_optional_mesh("loss")
        statistics.reduce(lambda x: dist_utils.dist_sum_tensor(x, mesh))
        if statistics.count < 2:
            return {}
        return {
            EFFECTIVE_RANK: statistics.effective_rank().item(),
            MEAN_COSINE: statistics.mean_cosine_similarity().item(),
        }


class ExpertLoad(Hook):
    """The largest load of a routed expert over the mean of its layer, the worst layer's; 1 is perfect balance."""

    def __init__(self, parallel_dims: ParallelDims, model_parts: list[nn.Module]):
        self._parallel_dims = parallel_dims
        self._counters = [
            module for part in model_parts for module in part.modules() if hasattr(module, "tokens_per_expert_E")
        ]
        self._before_LE: torch.Tensor | None = None
        self._after_LE: torch.Tensor | None = None

    def begin_step(self, moment: Moment) -> None:
        """Note the counts before a step that is to be logged: TorchTitan clears them only where it balances loads."""
        if self._counters and moment.logged:
            self._before_LE, self._after_LE = self._counts(), None

    def end_micro_batch(self, moment: Moment) -> None:
        """Note the counts after a micro-batch, if the step is to be logged."""
        if self._before_LE is not None:
            self._after_LE = self._counts()

    def _counts(self) -> torch.Tensor:
        counts = [moe.tokens_per_expert_E for moe in self._counters]
        return torch.stack([local(count) for count in counts]).clone()

    def take(self) -> dict[str, float]:
        """Return the step's figure, over all ranks; {} for a model without routed experts."""
        dims = self._parallel_dims
        load = torch.zeros((), device=tools.device_type)
        if self._before_LE is not None and self._after_LE is not None:
            counts_LE = self._after_LE - self._before_LE
            if dims.ep_enabled and dims.tp > 1:
                counts_LE = dist_utils.dist_sum_tensor(counts_LE, dims.get_mesh("tp"))
            counts_LE = dist_utils.dist_sum_tensor(counts_LE, dims.get_optional_mesh("loss"))
            load = (counts_LE.amax(dim=1) / counts_LE.mean(dim=1).clamp(min=1e-9)).max()
        self._before_LE = self._after_LE = None
        # A pipeline's stages have layers of their own, perhaps none with experts.
        worst = dist_utils.dist_max(load, mesh) if (mesh := dims.get_optional_mesh("pp")) else load.item()
        return {MAX_LOAD: worst} if worst else {}
