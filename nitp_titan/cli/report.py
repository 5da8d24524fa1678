"""``nitp-titan report``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from nitp_titan.cli.common import add_ngpu, ranks_of

DESCRIPTION = """\
Count a model's parameters and training FLOPs per token, what NITP adds to them (and what a multi-token-prediction
head would), and estimate the memory of a rank. Nothing is trained and no weights are allocated.

  nitp-titan report 9B-A1B --ngpu 8
  nitp-titan report job.toml --ngpu 64 --json --parallelism.expert_parallel_degree 8
"""


def add_parser(commands: Any) -> None:
    """Add the verb to the command line."""
    parser = commands.add_parser(
        "report",
        help="parameters, FLOPs and memory of a model, and what NITP adds",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="nitp-titan report FLAVOR|FILE [--ngpu N] [--json] [--table.key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="FLAVOR|FILE", help="a flavor of nitp_titan's, or a job file")
    add_ngpu(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the report; return the exit code."""
    from nitp_titan.tools.report import render, report

    costs = report(arguments.model, overrides, ranks_of(arguments))
    print(json.dumps(costs, indent=2) if arguments.json else render(costs), flush=True)
    return 0
