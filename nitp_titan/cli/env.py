"""``nitp-titan env``."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the verb to the command line."""
    commands.add_parser("env", help="versions, devices and what works with them")


def run(_: argparse.Namespace) -> int:
    """Print the table; return the exit code."""
    from nitp_titan.tools.env import environment_report

    print(environment_report(), flush=True)
    return 0
