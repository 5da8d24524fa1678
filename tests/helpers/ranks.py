"""Run a function on several gloo ranks."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a process that has imported what they need, which takes longer than most calls.
mp.get_context("forkserver").set_forkserver_preload(["tests.helpers.prepared"])


def _rank_main(rank: int, world_size: int, store: str, module: str, name: str, args: tuple, results: Any) -> None:
    import tests.helpers.prepared  # noqa: F401

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    try:
        results[rank] = getattr(importlib.import_module(module), name)(*args)
    finally:
        dist.destroy_process_group()


def run_on_ranks(world_size: int, function: Callable, *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank of a gloo group; return the ranks' results, in order.

    ``function`` must be importable, its arguments and result picklable. An exception on any rank is raised here.
    The ranks meet at a file of their own, so that no port is shared between tests.
    """
    # By name, so that a rank imports TorchTitan only when it has made ready for it.
    where = function.__module__, function.__name__
    with tempfile.TemporaryDirectory() as folder, mp.get_context("forkserver").Manager() as manager:
        results = manager.dict()
        mp.start_processes(
            _rank_main,
            args=(world_size, f"{folder}/store", *where, args, results),
            nprocs=world_size,
            start_method="forkserver",
        )
        return [results[rank] for rank in range(world_size)]
