"""The norm of a step's gradient, as TorchTitan's step takes it and tells nobody but its log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torchtitan.distributed import utils as dist_utils

from nitp_titan.nitp.dtensors import local

Told = Callable[[Tensor, list[Tensor]], None]
"""(norm of the whole gradient, whether the norms of this rank's parts of it are finite) -> nothing. All are 0-d."""


@contextlib.contextmanager
def told_of_norm(told: Told) -> Iterator[None]:
    """Inside, ``told`` is called as soon as a gradient has been clipped by its norm.

    There is no other place to hear of it before the optimizer's step: TorchTitan keeps the norm in a local variable,
    and to take it again would read all gradients again.
    """
    clip, norms_of = dist_utils.clip_grad_norm_, torch._foreach_norm
    parts: list[Tensor] = []

    def foreach_norm(*args: Any, **kwargs: Any) -> Any:
        # The total of them that torch returns is already the same on all ranks.
        norms = norms_of(*args, **kwargs)
        parts.append(torch.stack([local(norm) for norm in norms]).isfinite().all())
        return norms

    def clip_grad_norm_(*args: Any, **kwargs: Any) -> Tensor:
        parts.clear()
        torch._foreach_norm = foreach_norm
        try:
            norm = clip(*args, **kwargs)
        finally:
            torch._foreach_norm = norms_of
        told(norm, parts)
        return norm

    dist_utils.clip_grad_norm_ = clip_grad_norm_
    try:
        yield
    finally:
        dist_utils.clip_grad_norm_ = clip
