"""``nitp-titan check``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from nitp_titan.cli.common import add_ngpu, fail, ranks_of
from nitp_titan.job import Job, load_job
from nitp_titan.job.errors import did_you_mean, one_of
from nitp_titan.job.keys.schema import all_tables
from nitp_titan.job.resolve import merge
from nitp_titan.runtime import machine
from nitp_titan.tools.explain import explain_keys, explanation

DESCRIPTION = """\
Resolve, validate and explain a job file, without a GPU and without training.

Every key of every table can be given after the file; it overrides the file's:
  nitp-titan check job.toml --training.steps 100 --nitp.weight=0.8
  nitp-titan check job.toml --ngpu 8 --checkpoint.enable --compile.no-enable --compile.components model,loss
"none" unsets an optional key. `nitp-titan check --keys [TABLE]` lists the keys, what they mean, their defaults and
whose these are; `nitp-titan check FILE --keys [TABLE]` the values of a job.

--device says what the job is meant for: h100, cpu, or here (this machine). Unset, it is NITP_TITAN_DEVICE, or else this
machine where it has a GPU or the model is a debug one, and otherwise an H100. --strict ends with 2 where there is a
warning.

--dry-run also builds and shards the model as each rank of the run would, on a fake process group that takes no GPU
and no memory, and tells what every rank holds. It takes seconds; a layout that TorchTitan refuses is refused here.
  nitp-titan check job.toml --ngpu 256 --dry-run
"""


def add_parser(commands: Any) -> None:
    """Add the verb to the command line."""
    parser = commands.add_parser(
        "check",
        help="validate and explain a job file",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="nitp-titan check FILE [--ngpu N] [--device DEVICE] [--strict] [--dry-run] [--table.key value ...]\n"
        "       nitp-titan check [FILE] --keys [TABLE]",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="the job file, TOML")
    parser.add_argument("--dry-run", action="store_true", help="also shard the model, and tell what each rank holds")
    parser.add_argument("--device", choices=machine.DEVICES, help="what the job is meant for")
    parser.add_argument("--strict", action="store_true", help="end with 2 where there is a warning")
    parser.add_argument("--keys", metavar="TABLE", nargs="?", const="", help="list the keys of a table, or of all")
    add_ngpu(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Check, explain or list; return the exit code."""
    table = (arguments.keys or "").strip("[]")
    if arguments.keys is not None:
        if table and table not in all_tables():
            hint = did_you_mean(table, all_tables()) or f"the tables are {', '.join(all_tables())}"
            return fail(f"--keys: unknown table {table!r}; {hint}")
    elif arguments.file is None:
        return fail("nitp-titan check: expected a job file; see nitp-titan check --help")
    world_size = ranks_of(arguments)
    device = arguments.device or os.environ.get("NITP_TITAN_DEVICE")
    if device and device not in machine.DEVICES:
        return fail(f"NITP_TITAN_DEVICE: found {device!r}, expected {one_of(machine.DEVICES)}")
    with machine.meant_for(device or _usual_device(arguments.file, overrides, world_size)):
        job = load_job(arguments.file, overrides, world_size)
        if arguments.keys is not None:
            print("\n".join(explain_keys(job, table or None)).rstrip(), flush=True)
            return 0
        text, warnings = explanation(job)
        print(text, flush=True)
        if arguments.dry_run:
            _dry_run(job)
        warned = len(warnings) if arguments.strict else 0
        return fail(f"--strict: {warned} warning{'s' * (warned > 1)}") if warned else 0


def _dry_run(job: Job) -> None:
    from nitp_titan.runtime import prepare

    prepare()
    from nitp_titan.tools.estimate.dry_run import dry_run, render

    print(f"\n{render(dry_run(job))}", flush=True)


def _usual_device(file: str | None, overrides: list[str], world_size: int) -> str:
    draft, _ = merge(file, overrides, world_size)
    flavor = draft.settings.get(("model", "flavor"))
    return machine.usual_device(flavor.value) if flavor is not None else "here"
