"""The ``nitp-titan`` command. Exit codes: 0 fine, 2 bad input."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from nitp_titan import __version__
from nitp_titan.explain import explain, explain_keys, warnings_of
from nitp_titan.job import Job, JobError, load_job, machine
from nitp_titan.job.errors import did_you_mean, one_of
from nitp_titan.job.layout import DEGREES
from nitp_titan.job.read import split_command_line
from nitp_titan.job.resolve import resolve
from nitp_titan.job.schema import all_tables
from nitp_titan.train import split_config_file

_CHECK = """\
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

_REPORT = """\
Count a model's parameters and training FLOPs per token, what NITP adds to them (and what a multi-token-prediction
head would), and estimate the memory of a rank. Nothing is trained and no weights are allocated.

  nitp-titan report 9B-A1B --ngpu 8
  nitp-titan report job.toml --ngpu 64 --json --parallelism.expert_parallel_degree 8
"""

_EXPORT = """\
Write a training checkpoint as a Hugging Face folder that stock transformers load, without NITP's projector.

CHECKPOINT is a step-N folder, or the folder of a run or of its checkpoints: the latest complete step then. The job
file is the run's own config.toml where none is given.

  nitp-titan export outputs/run/checkpoint/step-1000 exported --job.config_file job.toml --dtype bfloat16
"""

# Which ranks trained the model, and on what, does not matter to an export.
_EXPORT_OVERRIDES = ["--model.attn_backend=flex", *(f"--parallelism.{degree}=1" for degree in DEGREES)]
for _table in ("dataloader", "validator.dataloader"):
    _EXPORT_OVERRIDES += [f"--{_table}.dataset=python_stdlib", f"--{_table}.dataset_path=none"]


def main(argv: list[str] | None = None) -> int:
    """Run ``nitp-titan`` with ``argv`` (default: the process's) and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    overrides: list[str] = []
    config_file = None
    if words[:1] == ["export"]:
        config_file, words = split_config_file(words)
    if words[:1] in (["check"], ["report"], ["export"]):
        overrides, words = split_command_line(words)
    parser = _parser()
    arguments, unknown = parser.parse_known_args(words)
    try:
        if arguments.command == "check":
            return _check(arguments, overrides + unknown)
        if arguments.command == "report":
            return _report(arguments, overrides + unknown)
        if arguments.command == "export":
            return _export(arguments, config_file, overrides + unknown)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return {"plot": _plot, "env": _env}[arguments.command](arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nitp-titan",
        description="Next Implicit Token Prediction on TorchTitan. Train with run_train.sh, or "
        "`torchrun -m nitp_titan.train --job.config_file FILE [--table.key value ...]`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nitp-titan {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = commands.add_parser(
        "check",
        help="validate and explain a job file",
        description=_CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="nitp-titan check FILE [--ngpu N] [--device DEVICE] [--strict] [--dry-run] [--table.key value ...]\n"
        "       nitp-titan check [FILE] --keys [TABLE]",
        allow_abbrev=False,
    )
    check.add_argument("file", metavar="FILE", nargs="?", help="the job file, TOML")
    check.add_argument("--dry-run", action="store_true", help="also shard the model, and tell what each rank holds")
    check.add_argument("--device", choices=machine.DEVICES, help="what the job is meant for")
    check.add_argument("--strict", action="store_true", help="end with 2 where there is a warning")
    check.add_argument("--keys", metavar="TABLE", nargs="?", const="", help="list the keys of a table, or of all")

    report = commands.add_parser(
        "report",
        help="parameters, FLOPs and memory of a model, and what NITP adds",
        description=_REPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="nitp-titan report FLAVOR|FILE [--ngpu N] [--json] [--table.key value ...]",
        allow_abbrev=False,
    )
    report.add_argument("model", metavar="FLAVOR|FILE", help="a flavor of nitp_titan's, or a job file")
    for command in (check, report):
        command.add_argument("--ngpu", metavar="N", type=_positive, help="ranks of the run (default: WORLD_SIZE, or 1)")
    report.add_argument("--json", action="store_true", help="print one JSON object")

    export = commands.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face folder",
        description=_EXPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="nitp-titan export CHECKPOINT OUT [--job.config_file FILE] [--dtype DTYPE] [--table.key value ...]",
        allow_abbrev=False,
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="step-N, or the folder of a run")
    export.add_argument("out", metavar="OUT", type=Path, help="the folder to write, empty or not there yet")
    dtypes = ("float32", "bfloat16", "float16")
    export.add_argument("--dtype", choices=dtypes, help="dtype of the weights (default: the checkpoint's)")

    plot = commands.add_parser("plot", help="draw the curves of runs", description="Draw the curves of runs as a PNG.")
    plot.add_argument("runs", metavar="RUN_DIR", nargs="+", type=Path, help="folder of a run (job.dump_folder)")
    plot.add_argument("--out", metavar="FILE.png", type=Path, required=True, help="the picture to write")

    commands.add_parser("env", help="versions, devices and what works with them")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 1")
    return int(text)


def _check(arguments: argparse.Namespace, overrides: list[str]) -> int:
    table = (arguments.keys or "").strip("[]")
    if arguments.keys is not None:
        if table and table not in all_tables():
            hint = did_you_mean(table, all_tables()) or f"the tables are {', '.join(all_tables())}"
            return _fail(f"--keys: unknown table {table!r}; {hint}")
    elif arguments.file is None:
        return _fail("nitp-titan check: expected a job file; see nitp-titan check --help")
    try:
        world_size = _world_size(arguments)
    except argparse.ArgumentTypeError as error:
        return _fail(f"WORLD_SIZE: {error}")
    device = arguments.device or os.environ.get("NITP_TITAN_DEVICE")
    if device and device not in machine.DEVICES:
        return _fail(f"NITP_TITAN_DEVICE: found {device!r}, expected {one_of(machine.DEVICES)}")
    with machine.meant_for(device or _usual_device(arguments.file, overrides, world_size)):
        try:
            job = load_job(arguments.file, overrides, world_size)
        except JobError as error:
            return _fail(str(error))
        if arguments.keys is not None:
            print("\n".join(explain_keys(job, table or None)).rstrip(), flush=True)
            return 0
        print(explain(job), flush=True)
        if arguments.dry_run and (code := _dry_run(job)):
            return code
        warned = len(warnings_of(job)) if arguments.strict else 0
        return _fail(f"--strict: {warned} warning{'s' * (warned > 1)}") if warned else 0


def _usual_device(file: str | None, overrides: list[str], world_size: int) -> str:
    draft, _ = resolve(file, overrides, world_size)
    flavor = draft.settings.get(("model", "flavor"))
    return machine.usual_device(flavor.value) if flavor is not None else "here"


def _dry_run(job: Job) -> int:
    from nitp_titan.runtime import prepare

    prepare()
    from nitp_titan.dry_run import dry_run, render

    try:
        groups = dry_run(job)
    except JobError as error:
        return _fail(str(error))
    print(f"\n{render(groups)}", flush=True)
    return 0


def _report(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from nitp_titan.report import render, report

    try:
        costs = report(arguments.model, overrides, _world_size(arguments))
    except argparse.ArgumentTypeError as error:
        return _fail(f"WORLD_SIZE: {error}")
    except JobError as error:
        return _fail(str(error))
    print(json.dumps(costs, indent=2) if arguments.json else render(costs), flush=True)
    return 0


def _world_size(arguments: argparse.Namespace) -> int:
    return arguments.ngpu or _positive(os.environ.get("WORLD_SIZE") or "1")


def _export(arguments: argparse.Namespace, config_file: str | None, overrides: list[str]) -> int:
    checkpoint = arguments.checkpoint.absolute()
    if config_file is None:
        places = [folder / "config.toml" for folder in (checkpoint, *checkpoint.parents[:2])]
        config_file = next((str(place) for place in places if place.is_file()), None)
    if config_file is None:
        return _fail(
            f"--job.config_file: expected the job's file, since {arguments.checkpoint} has no config.toml by it"
        )
    try:
        job = load_job(config_file, [*overrides, *_EXPORT_OVERRIDES], 1)
    except JobError as error:
        return _fail(str(error))
    from nitp_titan.runtime import prepare

    prepare()
    from nitp_titan.export import ExportError, export

    try:
        export(checkpoint, arguments.out, job, arguments.dtype)
    except ExportError as error:
        return _fail(str(error))
    print(arguments.out, flush=True)
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from nitp_titan.plot import plot_runs

    try:
        plot_runs(arguments.runs, arguments.out)
    except ValueError as error:
        return _fail(str(error))
    print(arguments.out, flush=True)
    return 0


def _env(_: argparse.Namespace) -> int:
    from nitp_titan.env import environment_report

    print(environment_report(), flush=True)
    return 0


def _fail(message: str) -> int:
    print(message, file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
