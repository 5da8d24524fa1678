"""Pipeline schedules that take micro-batches which TorchTitan has split already."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.pipelining import schedules

from nitp_titan.runtime.shims.shim import Shim
from nitp_titan.runtime.versions import release


def _takes_micro_batches(step: Callable) -> Callable:
    """``step`` that also takes ``arg_mbs``, ``kwarg_mbs`` and ``target_mbs``, lists with an entry a micro-batch."""

    @functools.wraps(step)
    def step_of_micro_batches(
        self: Any,
        *args: Any,
        arg_mbs: list | None = None,
        kwarg_mbs: list | None = None,
        target_mbs: list | None = None,
        target: Any = None,
        losses: list | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        options = {"losses": losses, "return_outputs": return_outputs, "loss_kwargs": loss_kwargs}
        if arg_mbs is None and kwarg_mbs is None and target_mbs is None:
            return step(self, *args, target=target, **options, **kwargs)
        if self._has_backward and not torch.is_grad_enabled():
            raise RuntimeError("step() needs gradients enabled; call eval() under no_grad")
        # What the original does around its own splitting.
        stages = self._stages if isinstance(self, schedules.PipelineScheduleMulti) else [self._stage]
        for stage in stages:
            stage.has_backward = self._has_backward
            stage.clear_runtime_states()
        self._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, **options)
        last = next((stage for stage in stages if stage.is_last), None)
        return self._merge_outputs(last.output_chunks) if last is not None and return_outputs else None

    return step_of_micro_batches


def _patch_steps() -> None:
    for schedule in (schedules.PipelineScheduleSingle, schedules.PipelineScheduleMulti):
        schedule.step = _takes_micro_batches(schedule.step)


SHIMS = [
    Shim(
        target="torch.distributed.pipelining.schedules.PipelineScheduleSingle.step, PipelineScheduleMulti.step",
        reason="torchtitan gives lists of micro-batches (arg_mbs, kwarg_mbs, target_mbs), which step does not take",
        until="torch 2.14",
        applies=lambda: (2, 13) <= release(torch.__version__) < (2, 14),
        apply=_patch_steps,
    ),
]
