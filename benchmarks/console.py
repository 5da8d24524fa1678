"""What the programs that measure set up before they start, and how they show what they found."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def choose_device(device: str) -> None:
    """Hide the GPUs from this process for "cpu", and set what every run sets; before torch is imported.

    Raises:
        ValueError: "cuda" without a GPU that torch can use.
    """
    # As run_train.sh: waiting OpenMP threads slow small work down by an order.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own chatter
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here")


@contextlib.contextmanager
def compiled_alone() -> Iterator[None]:
    """Inside, a process that compiles several models compiles each as if it were the only one.

    A function that meets a second shape would otherwise be compiled anew for all shapes, which is slower, and one
    that meets too many would not be compiled any more: the cross-entropy of whole logits and of chunks is one function.
    """
    import torch._dynamo

    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
        yield


@contextlib.contextmanager
def quiet_logs(verbose: bool) -> Iterator[None]:
    """Inside, leave errors of the logs of TorchTitan's trainers, which all say the same; or nothing out."""
    if verbose:
        from torchtitan.tools.logging import init_logger

        init_logger()
        yield
        return
    root = logging.getLogger()
    usual = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(usual)


def at_least(parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int) -> None:
    """End the program with a message and exit code 2 where an option is less than it may be."""
    for name, lowest in least.items():
        if (found := getattr(options, name)) < lowest:
            parser.error(f"--{name.replace('_', '-')}: found {found}, expected at least {lowest}")


def measure(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a program on the device that its options choose; return the exit code: its own, or 2 for a wrong option."""
    try:
        choose_device(options.device)
        with quiet_logs(options.verbose), compiled_alone():
            return run(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def print_table(table: Table) -> None:
    """Print a table, not cut to the width of a pipe."""
    from rich.console import Console

    console = Console()
    Console(width=None if console.is_terminal else 150).print(table)


def show(table: Table, path: Path) -> None:
    """Print a table, and where its numbers lie."""
    print_table(table)
    print(path)
