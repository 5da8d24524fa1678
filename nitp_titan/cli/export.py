"""``nitp-titan export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nitp_titan.cli.common import fail
from nitp_titan.job import load_job
from nitp_titan.job.layout import DEGREES

DESCRIPTION = """\
Write a training checkpoint as a Hugging Face folder that stock transformers load, without NITP's projector.

CHECKPOINT is a step-N folder, or the folder of a run or of its checkpoints: the latest complete step then. The job
file is the run's own config.toml where none is given.

  nitp-titan export outputs/run/checkpoint/step-1000 exported --job.config_file job.toml --dtype bfloat16
"""


# Which ranks trained the model, and on what, does not matter to an export.
_OVERRIDES = ["--model.attn_backend=flex", *(f"--parallelism.{degree}=1" for degree in DEGREES)]
for _table in ("dataloader", "validator.dataloader"):
    _OVERRIDES += [f"--{_table}.dataset=python_stdlib", f"--{_table}.dataset_path=none"]


def add_parser(commands: Any) -> None:
    """Add the verb to the command line."""
    parser = commands.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face folder",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="nitp-titan export CHECKPOINT OUT [--job.config_file FILE] [--dtype DTYPE] [--table.key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="step-N, or the folder of a run")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write, empty or not there yet")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="dtype of the weights (default: the checkpoint's)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Export a checkpoint; return the exit code."""
    config_file = arguments.config_file
    checkpoint = arguments.checkpoint.absolute()
    if config_file is None:
        places = [folder / "config.toml" for folder in (checkpoint, *checkpoint.parents[:2])]
        config_file = next((str(place) for place in places if place.is_file()), None)
    if config_file is None:
        return fail(
            f"--job.config_file: expected the job's file, since {arguments.checkpoint} has no config.toml by it"
        )
    job = load_job(config_file, [*overrides, *_OVERRIDES], 1)
    from nitp_titan.runtime import prepare

    prepare()
    from nitp_titan.checkpoints.stored import ExportError
    from nitp_titan.tools.export.folder import export

    try:
        export(checkpoint, arguments.out, job, arguments.dtype)
    except ExportError as error:
        return fail(str(error))
    print(arguments.out, flush=True)
    return 0
