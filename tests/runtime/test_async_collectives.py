"""Gradients through what is gathered asynchronously, against the closed form."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import local_map

from nitp_titan.runtime import prepare
from nitp_titan.runtime.shims.async_collectives import loses_gradients
from tests.helpers.ranks import run_on_ranks

ROWS = 3
"""Of each rank."""


class Seen(NamedTuple):
    gathered_as: str
    """Type of what is gathered, before local_map waits for it."""

    argument: str
    """Type of what the mapped function was given."""

    value: torch.Tensor
    gradient: torch.Tensor


def mapped_gather() -> Seen:
    """What a function under local_map sees of rows that are gathered asynchronously, and this rank's gradient of them.

    The result is the sum over ranks of each rank's (rank + 1) * sum of c_i * x_i^2, with c_i = i + 1.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    mine = torch.arange(ROWS, dtype=torch.float64) + ROWS * rank
    x = DTensor.from_local(mine.requires_grad_(), mesh, [Shard(0)], run_check=False)
    weights = torch.arange(1, ROWS * ranks + 1, dtype=torch.float64)
    arguments = []

    def weighted(whole: torch.Tensor) -> torch.Tensor:
        arguments.append(type(whole).__name__)
        return (rank + 1) * (weights * whole.square()).sum()

    # As TorchTitan does with a module's inputs.
    whole = x.redistribute(placements=[Replicate()], async_op=True)
    gathered_as = type(whole._local_tensor).__name__
    function = local_map(weighted, out_placements=[Partial()], in_grad_placements=([Partial()],))
    total = function(whole).redistribute(placements=[Replicate()]).to_local()
    total.backward()
    assert mine.grad is not None
    # It has been sent for asynchronously, too: a copy waits.
    return Seen(gathered_as, arguments[0], total.detach(), mine.grad.clone())


def test_local_map_of_an_asynchronous_gather_is_differentiable():
    ranks = 2
    x = torch.arange(ROWS * ranks, dtype=torch.float64)
    weights = x + 1
    of_all_ranks = sum(range(1, ranks + 1))
    for rank, seen in enumerate(run_on_ranks(ranks, mapped_gather)):
        assert seen.gathered_as == "AsyncCollectiveTensor"  # or the test shows nothing
        # The function gets a tensor whose collective is over: a kernel that takes its address reads what was gathered.
        assert seen.argument == "Tensor"
        assert seen.value == of_all_ranks * (weights * x.square()).sum()
        expected = of_all_ranks * 2 * weights * x
        torch.testing.assert_close(seen.gradient, expected[rank * ROWS : (rank + 1) * ROWS], rtol=1e-15, atol=0)


def test_no_torch_that_was_made_ready_loses_gradients():
    prepare()
    assert not loses_gradients()


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_waiting_for_a_constant_returns_the_tensor_itself(grad_enabled: bool):
    inner = torch.ones(2)
    with torch.set_grad_enabled(grad_enabled):
        waited = AsyncCollectiveTensor(inner).wait()
    assert waited is inner or waited.data_ptr() == inner.data_ptr()
    assert not waited.requires_grad


def test_waiting_twice_adds_both_gradients_and_leaves_the_wrapper_alone():
    leaf = torch.ones(2)
    waiting = AsyncCollectiveTensor(leaf).requires_grad_()
    view = waiting.view(2)
    (2 * view.wait() + 3 * view.wait()).sum().backward()
    assert waiting.grad is not None
    assert waiting.grad.tolist() == [5, 5]
    assert not leaf.requires_grad
