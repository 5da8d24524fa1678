"""Schedules that are given micro-batches, against torch's own splitting of the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from tests.helpers.ranks import run_on_ranks


def losses_of(schedule_name: str) -> list[tuple[list[float], list[float]]]:
    rank = torch.distributed.get_rank()
    results = []
    for split in (False, True):
        torch.manual_seed(rank)
        layer = torch.nn.Linear(4, 4)
        stage = PipelineStage(layer, rank, 2, torch.device("cpu"))
        schedule = get_schedule_class(schedule_name)(
            stage, 2, loss_fn=lambda out, target: (out - target).square().sum(), scale_grads=False
        )
        torch.manual_seed(9)
        x, y = torch.randn(4, 4), torch.randn(4, 4)
        losses: list[torch.Tensor] = []
        if split:
            args = [(part,) for part in x.chunk(2)] if rank == 0 else None
            targets = list(y.chunk(2)) if rank == 1 else None
            schedule.step(arg_mbs=args, kwarg_mbs=None, target_mbs=targets, losses=losses, return_outputs=False)
        elif rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=losses, return_outputs=False)
        assert layer.weight.grad is not None
        results.append(([loss.item() for loss in losses], layer.weight.grad.flatten().tolist()))
    return results


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe"])
def test_given_micro_batches_are_those_that_torch_would_split(schedule):
    for whole, split in run_on_ranks(2, losses_of, schedule):
        assert whole == split
