"""Whether a checkpoint fits the disk: its size, computed from the state that is to be saved, against what is free."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils._pytree import tree_leaves
from torchtitan.components.checkpointer.base import OPTIMIZER

from nitp_titan.checkpoints.ranks import of_every_rank
from nitp_titan.runs.errors import DiskError

_MOMENTS = {"Adam": 2, "AdamW": 2}
"""Tensors of a parameter's size that an optimizer keeps of it, once it has stepped."""


def require_space(state: dict[str, Any], folder: str) -> None:
    """Refuse a checkpoint that does not fit; a collective operation of all ranks, which come to the same result.

    Args:
        state: what is to be saved: tensors by name, and stateful parts. The optimizer may not have stepped yet.
        folder: where to.

    Raises:
        DiskError: the message says how much it takes, and how much is free where.
    """
    if "://" in folder:
        return  # another library's, which does not tell
    # Ranks of a pipeline's stage have the same names, of which each tensor is saved once.
    names = zlib.crc32("\n".join(sorted(state)).encode())
    ranks = of_every_rank((names, bytes_of(state), _free(folder)))
    needed = sum({names: size for names, size, _ in ranks}.values())
    # A folder may be of this machine alone: the one that has least of it counts.
    free = min(free for _, _, free in ranks)
    if needed > free:
        raise DiskError(
            f"{folder}: a checkpoint takes {_as_text(needed)}, and {_as_text(free)} are free there; free space, give "
            "another job.dump_folder, or keep fewer checkpoints (checkpoint.keep_latest_k)"
        )


def bytes_of(state: dict[str, Any]) -> int:
    """Return the bytes of a rank's tensors, of sharded ones with the other ranks' shards."""
    total = 0
    for name, value in state.items():
        if name == OPTIMIZER:
            total += sum(_bytes_of_optimizer(optimizer) for optimizer in value)
        elif not isinstance(value, Stateful):
            total += _bytes(value)
    return total


def _bytes(tree: Any) -> int:
    # A DTensor's number of elements is the whole tensor's.
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _bytes_of_optimizer(optimizer: torch.optim.Optimizer) -> int:
    moments = next((_MOMENTS[kind.__name__] for kind in type(optimizer).__mro__ if kind.__name__ in _MOMENTS), 0)
    # TorchTitan's "fused_opt_states_bf16" makes the moments in a hook of the first step.
    in_bf16 = any("bf16" in getattr(hook, "__name__", "") for hook in optimizer._optimizer_step_pre_hooks.values())
    total = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if kept := optimizer.state.get(parameter):
                total += _bytes(kept)
            elif parameter.requires_grad:
                total += moments * parameter.numel() * (2 if in_bf16 else parameter.element_size())
    return total


def _free(folder: str) -> int:
    path = Path(os.path.abspath(folder))
    existing = next(part for part in (path, *path.parents) if part.exists())
    return shutil.disk_usage(existing).free


def _as_text(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"
