"""Metrics of a step in which a rank has no label that counts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from nitp_titan.nitp.dtensors import local
from nitp_titan.runtime.shims.shim import Shim


def largest_number(dist_max: Callable[..., float]) -> Callable[..., float]:
    """Wrap TorchTitan's ``dist_max`` so that NaN does not count as the largest; where there is no number, it is 0.

    A loss that is not finite is not hidden by it: TorchTitan looks at the mean, and stops.
    """

    @functools.wraps(dist_max)
    def of_numbers(x: torch.Tensor, *args: Any, **kwargs: Any) -> float:
        here = local(x)  # as TorchTitan takes it
        largest = dist_max(torch.where(here.isnan(), -torch.inf, here), *args, **kwargs)
        return 0.0 if largest == -torch.inf else largest

    return of_numbers


def _patch() -> None:
    import torchtitan.distributed.utils as utils

    utils.dist_max = largest_number(utils.dist_max)


SHIMS = [
    Shim(
        target="torchtitan.distributed.utils.dist_max",
        reason="global_max_loss is the largest of the ranks' mean losses: 0 / 0 on a rank without a label that counts, "
        "and so, where NaN is taken for the largest, everywhere",
        until="a TorchTitan release whose trainer leaves such ranks out",
        applies=lambda: True,
        apply=_patch,
    ),
]
