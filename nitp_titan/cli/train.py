"""``nitp-titan train``."""

from __future__ import annotations

import argparse
from typing import Any

from nitp_titan.cli.common import positive

DESCRIPTION = """\
Check a job, then train it: what run_train.sh does, and where it is installed alone.

  nitp-titan train job.toml --training.steps 100
  nitp-titan train job.toml --ngpu 8

Exit codes: 0 done, or interrupted by a signal and saved (the run folder's status.json says which); 2 bad input;
3 numbers that are not finite; anything else is a failure. SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 end a run after its
step, with a checkpoint; a second one ends it at once. The environment has what run_train.sh documents: NNODES, ...
"""


def add_parser(commands: Any) -> None:
    """Add the verb to the command line."""
    parser = commands.add_parser(
        "train",
        help="train a job on this machine's devices",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="nitp-titan train FILE [--ngpu N] [--table.key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="the job file, TOML")
    parser.add_argument(
        "--ngpu", metavar="N", type=positive, help="ranks on this machine (default: the environment's NGPU, or 1)"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Train; return the exit code."""
    from nitp_titan.launch import launch

    return launch(arguments.file, overrides, entry="nitp-titan train", ranks_here=arguments.ngpu)
