"""Collectives that gloo, the CPU's backend, does not have."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from nitp_titan.runtime.shims.cpu_device import on_cpu
from nitp_titan.runtime.shims.shim import Shim


def _disable_fsdp_gradient_division(model: torch.nn.Module) -> None:
    """Upstream's function of this name, with the reduction spelled as a plain sum."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _set_pg_timeouts(timeout: timedelta, parallel_dims: Any) -> None:
    """Upstream's function of this name, with a barrier that names no device."""
    torch.distributed.barrier()
    meshes = parallel_dims.get_all_one_dimensional_meshes().values()
    for group in [*(mesh.get_group() for mesh in meshes), None]:
        torch.distributed.set_timeout(timeout, group)


def _patch_fsdp() -> None:
    import torchtitan.distributed.fsdp as fsdp

    fsdp.disable_fsdp_gradient_division = _disable_fsdp_gradient_division


class _OneAtATime:
    """torch's functional collectives, whose gathers are over when they return."""

    def __getattr__(self, name: str) -> Any:
        from torch.distributed import _functional_collectives as collectives

        function = getattr(collectives, name)
        if not name.startswith("all_gather"):
            return function

        def gather(*args: Any, **kwargs: Any) -> torch.Tensor:
            gathered = function(*args, **kwargs)
            return gathered.wait() if isinstance(gathered, collectives.AsyncCollectiveTensor) else gathered

        return gather


def _patch_context_parallel() -> None:
    from torch.distributed.tensor.experimental._context_parallel import _cp_custom_ops

    _cp_custom_ops.funcol = _OneAtATime()


def _patch_timeouts() -> None:
    import torchtitan.distributed.utils as utils

    utils.set_pg_timeouts = _set_pg_timeouts


SHIMS = [
    Shim(
        target="torchtitan.distributed.fsdp.disable_fsdp_gradient_division",
        reason="a divide factor of 1 makes FSDP reduce with PREMUL_SUM, which gloo lacks",
        until="torch reduces with SUM where the factor is 1",
        applies=on_cpu,
        apply=_patch_fsdp,
    ),
    Shim(
        target="torchtitan.distributed.utils.set_pg_timeouts",
        reason="its barrier passes device_ids, which gloo refuses",
        until="a TorchTitan release that trains on a CPU",
        applies=on_cpu,
        apply=_patch_timeouts,
    ),
    Shim(
        target="torch.distributed.tensor.experimental._context_parallel._cp_custom_ops.funcol",
        reason="context parallelism gathers keys and values at the same time, during which gloo now and then corrupts "
        "the heap (3 of 10 runs of 60 steps on 8 ranks crashed, one of them without NITP; none of 10 with this)",
        until="such runs do not crash with a newer torch",
        applies=on_cpu,
        apply=_patch_context_parallel,
    ),
]
