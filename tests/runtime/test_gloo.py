"""Collectives on gloo."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.helpers.ranks import run_on_ranks


def gathered_keys_and_values() -> tuple[list[type], torch.Tensor, torch.Tensor]:
    """What context parallelism gathers, and the types of what each gather returned."""
    from torch.distributed.tensor.experimental._context_parallel import _cp_custom_ops as operators

    seen: list[type] = []
    through = operators.funcol

    class Noted:
        def __getattr__(self, name: str) -> object:
            function = getattr(through, name)
            if not name.startswith("all_gather"):
                return function

            def noted(*args: object) -> torch.Tensor:
                out = function(*args)
                seen.append(type(out))
                return out

            return noted

    operators.funcol = Noted()
    rank = dist.get_rank()
    group = dist.group.WORLD.group_name
    keys, values = torch.full((1, 2, 3), float(rank)), torch.full((1, 2, 3), 10.0 + rank)
    return seen, *operators.flex_cp_allgather(keys, values, 1, group)


def test_context_parallelism_has_one_gather_at_a_time():
    for seen, keys, values in run_on_ranks(2, gathered_keys_and_values):
        assert seen == [torch.Tensor, torch.Tensor]  # and not AsyncCollectiveTensor
        assert keys[0, :, 0].tolist() == [0, 0, 1, 1]
        assert values[0, :, 0].tolist() == [10, 10, 11, 11]
