"""The largest of some numbers, of which a rank may have none."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.distributed import utils

from tests.helpers.ranks import run_on_ranks

NAN = torch.nan


@pytest.mark.parametrize(("value", "largest"), [(2.5, 2.5), (-1.0, -1.0), (NAN, 0.0), (-torch.inf, 0.0)])
def test_of_one_rank(value: float, largest: float):
    assert utils.dist_max(torch.tensor(value)) == largest


def largest_of(values: list[float]) -> float:
    mesh = init_device_mesh("cpu", (len(values),))
    return utils.dist_max(torch.tensor(values[torch.distributed.get_rank()]), mesh)


@pytest.mark.parametrize(
    ("values", "largest"), [([1.0, 2.0], 2.0), ([NAN, 2.0], 2.0), ([-2.0, NAN], -2.0), ([NAN, NAN], 0.0)]
)
def test_of_two_ranks(values: list[float], largest: float):
    assert run_on_ranks(2, largest_of, values) == [largest] * 2
