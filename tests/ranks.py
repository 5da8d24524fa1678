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


def _rank_main(rank: int, world_size: int, store: str, module: str, name: str, args: tuple, results: Any) -> None:
    from nitp_titan.runtime import prepare

    torch.set_num_threads(1)
    prepare()
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
    with tempfile.TemporaryDirectory() as folder, mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank_main, args=(world_size, f"{folder}/store", *where, args, results), nprocs=world_size, join=True)
        return [results[rank] for rank in range(world_size)]
