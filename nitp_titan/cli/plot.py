"""``nitp-titan plot``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nitp_titan.cli.common import fail


def add_parser(commands: Any) -> None:
    """Add the verb to the command line."""
    parser = commands.add_parser(
        "plot", help="draw the curves of runs", description="Draw the curves of runs as a PNG."
    )
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", type=Path, help="folder of a run (job.dump_folder)")
    parser.add_argument("--out", metavar="FILE.png", type=Path, required=True, help="the picture to write")


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture; return the exit code."""
    from nitp_titan.tools.plot import plot_runs

    try:
        plot_runs(arguments.runs, arguments.out)
    except ValueError as error:
        return fail(str(error))
    print(arguments.out, flush=True)
    return 0
