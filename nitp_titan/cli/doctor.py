"""``nitp-titan doctor``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nitp_titan.cli.common import add_ngpu, fail, ranks_of
from nitp_titan.job import load_job

DESCRIPTION = """\
Say in what state a run is: its checkpoints, from which one it would go on, and why not from the others. Nothing is
changed. The exit code is 0 if the run can be gone on with, else 2.

  nitp-titan doctor outputs/run
  nitp-titan doctor outputs/run --job.config_file job.toml --ngpu 8 --optimizer.lr 1e-4    what the job would change
"""


def add_parser(commands: Any) -> None:
    """Add the verb to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="whether a run can be gone on with, and from where",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="nitp-titan doctor RUN [--checksums] [--json]\n"
        "                         [--job.config_file FILE [--ngpu N] [--table.key value ...]]",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run (job.dump_folder)")
    parser.add_argument("--checksums", action="store_true", help="read the files whole, against their checksums")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_ngpu(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Examine the run; return the exit code."""
    from nitp_titan.tools.doctor import NoRun, examine, render

    job = None
    if arguments.config_file is not None:
        job = load_job(arguments.config_file, overrides, ranks_of(arguments))
    elif overrides:
        return fail(f"nitp-titan doctor: found {overrides[0]} without --job.config_file FILE, whose values it changes")
    try:
        state = examine(arguments.run, job, checksums=arguments.checksums)
    except NoRun as error:
        return fail(str(error))
    print(json.dumps(state, indent=2) if arguments.json else render(state), flush=True)
    return 0 if state["can_resume"] else 2
