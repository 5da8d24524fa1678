"""Plain tensors of spread ones, and their gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nitp_titan.nitp.dtensors import local, local_as
from tests.helpers.ranks import run_on_ranks


def test_plain_tensors_are_themselves():
    from torch.distributed.tensor import Shard

    x = torch.zeros(3)
    assert local(x) is x
    assert local_as(x, Shard(0)) is x


def spread() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A rank's rows of a sharded tensor, its columns of it, and the gradient of their sum times the rank's number."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    x = distribute_tensor(torch.arange(8.0).view(2, 4), mesh, [Shard(0)]).requires_grad_()
    columns = local_as(x, Shard(1))
    (columns.sum() * (1 + dist.get_rank())).backward()
    return local(x).detach(), columns.detach(), x.grad.full_tensor()


def test_a_ranks_part_in_another_placement():
    for rank, (rows, columns, gradient) in enumerate(run_on_ranks(2, spread)):
        assert rows.tolist() == [[4 * rank, 4 * rank + 1, 4 * rank + 2, 4 * rank + 3]]
        assert columns.tolist() == [[2 * rank, 2 * rank + 1], [4 + 2 * rank, 5 + 2 * rank]]
        assert gradient.tolist() == [[1, 1, 2, 2]] * 2
