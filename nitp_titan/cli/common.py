"""What the verbs of the command line share."""

from __future__ import annotations

import argparse
import os
import sys

from nitp_titan.job.errors import JobError, Problem

_MOST_RANKS = 10**7
"""More is a slip of the finger, because every rank's stage and expert is looked at in turn."""


def positive(text: str) -> int:
    """Read a whole number of at least 1, for argparse."""
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_RANKS:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 1..{_MOST_RANKS}")
    return int(text)


def ranks_of(arguments: argparse.Namespace) -> int:
    """Return how many ranks a run is to have: ``--ngpu``, or this environment's.

    Raises:
        JobError: ``WORLD_SIZE`` is no number of ranks.
    """
    try:
        return arguments.ngpu or positive(os.environ.get("WORLD_SIZE") or "1")
    except argparse.ArgumentTypeError as error:
        raise JobError([Problem("WORLD_SIZE", "", str(error))]) from error


def fail(message: str) -> int:
    """Print a message, and return the exit code of bad input."""
    print(message, file=sys.stderr, flush=True)
    return 2


def add_ngpu(parser: argparse.ArgumentParser) -> None:
    """Add ``--ngpu``, which :func:`ranks_of` reads."""
    parser.add_argument("--ngpu", metavar="N", type=positive, help="ranks of the run (default: WORLD_SIZE, or 1)")
