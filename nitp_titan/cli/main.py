"""The ``nitp-titan`` command. Exit codes: 0 fine, 2 bad input; of ``train`` those of its ranks."""

from __future__ import annotations

import argparse
import os
import sys
from types import ModuleType

from nitp_titan import __version__
from nitp_titan.cli import check, doctor, env, export, plot, report, train
from nitp_titan.cli.common import fail
from nitp_titan.job import JobError
from nitp_titan.job.reading.command_line import split_command_line, split_config_file

_VERBS: dict[str, ModuleType] = {
    "train": train,
    "check": check,
    "report": report,
    "doctor": doctor,
    "export": export,
    "plot": plot,
    "env": env,
}
_OF_JOBS = ("train", "check", "report", "export", "doctor")
"""Verbs that take ``--table.key value``."""


def main(argv: list[str] | None = None) -> int:
    """Run ``nitp-titan`` with ``argv`` (default: the process's) and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    verb = words[0] if words else ""
    overrides: list[str] = []
    config_file = None
    if verb in ("export", "doctor"):
        config_file, words = split_config_file(words)
    if verb in _OF_JOBS:
        overrides, words = split_command_line(words)
    parser = _parser()
    arguments, unknown = parser.parse_known_args(words)
    arguments.config_file = config_file
    try:
        if arguments.command in _OF_JOBS:
            return _VERBS[arguments.command].run(arguments, overrides + unknown)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return _VERBS[arguments.command].run(arguments)
    except JobError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nitp-titan",
        description="Next Implicit Token Prediction on TorchTitan. Train with `nitp-titan train`, "
        "run_train.sh, or `torchrun -m nitp_titan.train --job.config_file FILE [--table.key value ...]`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nitp-titan {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for verb in _VERBS.values():
        verb.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
