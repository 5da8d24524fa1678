"""Names that TorchTitan 0.3 takes from torch and that older supported versions lack."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import torch.distributed
import torch.distributed.fsdp

from nitp_titan.runtime.shims.shim import Shim


@dataclasses.dataclass(frozen=True)
class DataParallelMeshDims:
    """Stand-in for torch's own. Only the spmd_types and full_dtensor backends, which need torch >= 2.14, use one."""

    shard: object = None
    replicate: object = None


def _set_timeout(timeout: timedelta, group: torch.distributed.ProcessGroup | None = None) -> None:
    torch.distributed.distributed_c10d._set_pg_timeout(timeout, group)


SHIMS = [
    Shim(
        target="torch.distributed.fsdp.DataParallelMeshDims",
        reason="torchtitan.distributed.fsdp imports it by name",
        until="torch 2.12",
        applies=lambda: not hasattr(torch.distributed.fsdp, "DataParallelMeshDims"),
        apply=lambda: setattr(torch.distributed.fsdp, "DataParallelMeshDims", DataParallelMeshDims),
    ),
    Shim(
        target="torch.distributed.set_timeout",
        reason="torchtitan shortens the timeout of its process groups with it after the first step",
        until="torch 2.14",
        applies=lambda: not hasattr(torch.distributed, "set_timeout"),
        apply=lambda: setattr(torch.distributed, "set_timeout", _set_timeout),
    ),
]
