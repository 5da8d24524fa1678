"""The training entry: ``torchrun ... -m nitp_titan.train --job.config_file FILE [--table.key value ...]``.

Without torchrun it trains in one process on one device.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nitp_titan.data.errors import DataError
from nitp_titan.job import Job, JobError, Problem, load_job
from nitp_titan.job.reading.command_line import split_config_file
from nitp_titan.training.errors import NotFinite

if TYPE_CHECKING:
    from nitp_titan.training.trainer import NITPTrainer

USAGE = "usage: python -m nitp_titan.train --job.config_file FILE [--table.key value ...]"


def main(arguments: list[str] | None = None) -> int:
    """Train a job; return the exit code: 0, 2 for a bad job file, command line or corpus, 3 for bad numbers."""
    config_file, overrides = split_config_file(sys.argv[1:] if arguments is None else arguments)
    if config_file is None:
        return _refuse(USAGE)
    launch_alone()
    try:
        job = load_job(config_file, overrides, int(os.environ["WORLD_SIZE"]), for_training=True)
        config = build(job)
        train(config, job)
    except (JobError, DataError) as error:
        return _refuse(str(error))
    except NotFinite as error:
        return _refuse(str(error), code=3)
    return 0


def _refuse(message: str, code: int = 2) -> int:
    """Say what is wrong, once for all ranks, and return the exit code."""
    if handed := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # TorchTitan hands torchrun the traceback of whatever it raises, which would be printed at the end.
        Path(handed).unlink(missing_ok=True)
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
    else:
        # torchrun ends every rank when the first one fails: the one that speaks has to come first.
        time.sleep(2)
    return code


def launch_alone() -> None:
    """Set what torchrun would for one process, where it did not start this one."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in alone.items()})
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})


def build(job: Job) -> NITPTrainer.Config:
    """Import torch and TorchTitan, made ready for this machine, and build the job's configuration."""
    from nitp_titan.runtime import prepare

    prepare()
    from nitp_titan.job.build import build_trainer_config

    return build_trainer_config(job)


def train(config: NITPTrainer.Config, job: Job) -> None:
    """Run the trainer as TorchTitan's own entry does (torchtitan/train.py)."""
    import torch
    from torchtitan.observability import structured_logger
    from torchtitan.tools.logging import init_logger, logger

    from nitp_titan.checkpoints.manager import CheckpointManager
    from nitp_titan.job.earlier import RESOLVED, changes_since, write_beside_earlier
    from nitp_titan.job.fingerprint import fingerprint

    init_logger()
    for note in job.notes:
        logger.info(note)
    is_first = os.environ["RANK"] == "0"
    run_folder = Path(config.dump_folder)
    changes: list[str] = []
    if is_first:
        changes = changes_since(run_folder / RESOLVED, job)
        write_beside_earlier(job, run_folder / RESOLVED)
    structured_logger.init_structured_logger(
        source="training", output_dir=config.dump_folder, enable=config.debug.enable_structured_logging
    )
    trainer = None
    try:
        try:
            trainer = config.build()
        except ValueError as error:
            # What the checks of the job could not see: it takes the data, the tokenizer or the model itself.
            raise JobError([Problem(job.file, "", str(error))]) from error
        if isinstance(trainer.checkpointer, CheckpointManager):
            trainer.checkpointer.fingerprint = fingerprint(job)
        if config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            trainer.changes = changes
            trainer.train()
            if not trainer.steps_run and not trainer.out_of_data:
                logger.warning(
                    f"Nothing to train: {run_folder} is at step {trainer.step} of {config.training.steps}. "
                    "Set more training.steps, or another job.dump_folder"
                )
    finally:
        if trainer is not None:
            trainer.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if is_first:
        logger.info(f"Run folder: {run_folder} ({', '.join(sorted(path.name for path in run_folder.iterdir()))})")


if __name__ == "__main__":
    sys.exit(main())
