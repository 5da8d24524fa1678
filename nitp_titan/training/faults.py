"""Steps with numbers that are not finite, or far off, leave no trace: decided on the device, before the update.

The host launches every step as if it were good, and reads what the device has decided where it waits for the device
anyway: on logging steps, before a checkpoint and at the end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger

from nitp_titan.nitp.dtensors import local
from nitp_titan.runs.tags import SKIPPED_STEPS
from nitp_titan.training.decisions import (
    GRADIENT,
    LOSS,
    LOSS_SPIKE,
    NORM,
    NORM_SPIKE,
    Decisions,
    Seen,
    ending,
    skipping,
)
from nitp_titan.training.errors import NotFinite
from nitp_titan.training.faults_config import FaultsConfig
from nitp_titan.training.gradient_norm import told_of_norm
from nitp_titan.training.hooks import Hook, Moment
from nitp_titan.training.optimizer_hold import OptimizerHold
from nitp_titan.training.router_state import RouterState
from nitp_titan.training.spikes import Window


class StepGuard(Hook):
    """Decides of each step whether its update takes place.

    After the step that ends the run no other takes place either, until the host has noticed.
    """

    def __init__(
        self,
        config: FaultsConfig,
        *,
        device: torch.device,
        parallel_dims: ParallelDims,
        model_parts: list[nn.Module],
        optimizers: OptimizersContainer,
        has_loss: bool,
        windows_end_at: int,
        last_checkpoint: Callable[[int], str],
    ):
        """Watch over a run.

        Args:
            has_loss: whether this rank has the loss: under a pipeline its last stage alone.
            windows_end_at: a step from which on the loss is another sum, so that spikes are judged by it anew.
            last_checkpoint: returns the newest complete checkpoint of a step before the given one; "" for none.
        """
        self._config, self._device, self._has_loss = config, device, has_loss
        self._loss_mesh = parallel_dims.get_optional_mesh("loss")
        self._windows_end_at, self._last_checkpoint = windows_end_at, last_checkpoint
        self._world, self._rank = dist.get_world_size(), dist.get_rank()
        self._model_parts = model_parts
        self._decisions = Decisions(config, device, self._world)
        self._routers = RouterState(model_parts)
        self._hold = OptimizerHold(optimizers, device)
        # After TorchTitan's hook, which moves the routers' biases whatever the optimizers' steps do.
        optimizers.register_step_post_hook(lambda *args: self._routers.restore_where(self._decisions.skip))
        self._loss_window, self._norm_window = (
            Window(config.spike_window, sigma, device) if sigma else None
            for sigma in (config.loss_spike_sigma, config.grad_norm_spike_sigma)
        )
        self._loss_is_bad = torch.zeros((), dtype=torch.bool, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._never = torch.zeros((), dtype=torch.bool, device=device)
        self._step = 0
        self._seen: Seen | None = None
        self._told = 0

    def begin_step(self, moment: Moment) -> None:
        self._step, self._seen = moment.step, None
        self._loss_is_bad.zero_()
        self._loss.zero_()
        self._routers.keep()
        if moment.step == self._windows_end_at:
            for window in (self._loss_window, self._norm_window):
                if window is not None:
                    window.clear()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside is TorchTitan's step."""
        try:
            with told_of_norm(self._decide):
                yield
        finally:
            self._hold.release()

    @torch.no_grad()
    def take_loss(self, loss: Tensor, logged: bool) -> Tensor:
        """Take note of a micro-batch's loss and return what TorchTitan is to have: where it logs a step, finite losses.

        It would end the run at another one, after the update and on some of a pipeline's ranks alone. What is logged
        is :meth:`as_computed`.
        """
        loss = loss.detach()
        self._loss_is_bad.logical_or_(local(loss).isfinite().all().logical_not())
        if self._loss_window is not None and self._has_loss:
            self._loss.add_((loss.full_tensor() if isinstance(loss, DTensor) else loss).sum())
        return torch.where(loss.isfinite(), loss, 0.0) if logged else loss

    @torch.no_grad()
    def _decide(self, norm: Tensor, parts_are_finite: list[Tensor]) -> None:
        norm, parts = self._here(norm), [self._here(finite) for finite in parts_are_finite]
        found = {
            NORM_SPIKE: self._never if self._norm_window is None else self._norm_window.take(norm),
            LOSS_SPIKE: self._never,
            NORM: norm.isfinite().logical_not(),
            GRADIENT: torch.stack(parts).all().logical_not() if parts else self._never,
            LOSS: self._loss_is_bad,
        }
        if self._loss_window is not None:
            spike = self._loss_window.take(dist_utils.dist_sum_tensor(self._loss.clone(), self._loss_mesh))
            found[LOSS_SPIKE] = spike if self._has_loss else self._never
        worst = torch.stack([reason * is_so for reason, is_so in found.items()]).amax()
        code = self._decisions.code(worst, self._rank)
        if self._world > 1:
            dist.all_reduce(code, op=dist.ReduceOp.MAX)
        self._decisions.take(self._step, code)
        self._hold.where(self._decisions.skip)

    def _here(self, x: Tensor) -> Tensor:
        # Parameters that are offloaded to the CPU have their gradients there.
        return x if x.device == self._device else x.to(self._device)

    def look(self) -> Seen:
        """Return what has been decided, for which the host waits.

        Raises:
            NotFinite: the run is to end, on all ranks alike.
        """
        if self._seen is None:
            self._seen = self._decisions.read()
        seen = self._seen
        if seen.stopped:
            raise NotFinite(ending(seen, self._config, self._last_checkpoint(seen.cause.step)))
        if seen.skipped > self._told:
            self._told = seen.skipped
            logger.warning(skipping(seen, self._config))
        return seen

    def as_computed(self, *losses: float) -> tuple[float, ...]:
        """Return a logged step's losses as they are to be logged: not a number where one was none.

        Raises:
            NotFinite: as of :meth:`look`.
        """
        last = self.look().last
        return (math.nan,) * len(losses) if last.step == self._step and last.reason == LOSS else losses

    def metrics(self) -> dict[str, float]:
        """Return the number of skipped steps since the start of this process."""
        return {SKIPPED_STEPS: float(self.look().skipped)}

    def before_save(self) -> None:
        """Make sure that a checkpoint of this step may be written, for which the host waits.

        Raises:
            NotFinite: as of :meth:`look`, or a weight is not finite.
        """
        seen = self.look()
        if seen.skipped:
            self._hold.make_state()
        if (rank := self._first_rank_with_a_bad_weight()) is not None:
            checkpoint = self._last_checkpoint(self._step)
            left = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
            raise NotFinite(
                f"step {self._step}: a weight is not finite, first on rank {rank}, after losses and gradients that "
                f"were; no checkpoint of it is written, and {left} (a lower optimizer.lr may help)"
            )

    @torch.no_grad()
    def _first_rank_with_a_bad_weight(self) -> int | None:
        weights = [local(p).detach() for part in self._model_parts for p in part.parameters()]
        weights = [weight for weight in weights if weight.numel() and weight.is_floating_point()]
        # The largest magnitude: no copy, and not a number where one is none.
        sizes = torch._foreach_norm(weights, ord=math.inf) if weights else []
        bad = ~torch.stack([self._here(size) for size in sizes]).isfinite().all() if sizes else self._never
        code = bad * (self._world - self._rank)
        if self._world > 1:
            dist.all_reduce(code, op=dist.ReduceOp.MAX)
        code = int(code.item())
        return self._world - code if code else None
