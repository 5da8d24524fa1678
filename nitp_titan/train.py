"""The training entry: ``torchrun ... -m nitp_titan.train --job.config_file FILE [--table.key value ...]``.

Without torchrun it trains in one process on one device.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nitp_titan.data.errors import DataError
from nitp_titan.job import Job, JobError, Problem, load_job
from nitp_titan.job.reading.command_line import split_config_file
from nitp_titan.training.signals import Interrupted, Signals, before_the_first_step

if TYPE_CHECKING:
    from nitp_titan.training.run_record import RunRecord
    from nitp_titan.training.trainer import NITPTrainer

USAGE = "usage: python -m nitp_titan.train --job.config_file FILE [--table.key value ...]"


def main(arguments: list[str] | None = None) -> int:
    """Train a job; return the exit code.

    0: the run is done, or a signal has ended it and its state is saved. 2: bad input. 3: numbers are not finite.
    1: what the run has to write cannot be written; with a traceback, whatever nobody has thought of.
    """
    config_file, overrides = split_config_file(sys.argv[1:] if arguments is None else arguments)
    if config_file is None:
        return _refuse(USAGE)
    launch_alone()
    signals = Signals()
    # Alone, there is nobody to tell.
    signals.raising = os.environ["WORLD_SIZE"] == "1"
    try:
        job = load_job(config_file, overrides, int(os.environ["WORLD_SIZE"]), for_training=True)
        config = build(job)
        train(config, job, signals)
    except Interrupted as name:
        print(before_the_first_step(name), flush=True)
    except (JobError, DataError) as error:
        return _refuse(str(error))
    except Exception as error:
        from nitp_titan.training.ending import ending

        end = ending(error)
        if not end.is_told:
            raise
        return _refuse(str(error) if end.exit_code != 1 else end.reason, end.exit_code)
    finally:
        signals.close()
    return 0


def _refuse(message: str, code: int = 2) -> int:
    """Say what is wrong, once for all ranks, and return the exit code."""
    if handed := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # What the launcher is to say of this rank, in place of the traceback of whatever TorchTitan raises.
        with contextlib.suppress(OSError):
            Path(handed).write_text(json.dumps({"message": message, "timestamp": str(int(time.time()))}))
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
    else:
        # The launcher ends every rank when the first one fails: the one that speaks has to come first.
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


def train(config: NITPTrainer.Config, job: Job, signals: Signals) -> None:
    """Run the trainer as TorchTitan's own entry does (torchtitan/train.py)."""
    import torch
    from torch.distributed.distributed_c10d import _get_default_store
    from torchtitan.tools.logging import init_logger, logger

    from nitp_titan.checkpoints.manager import CheckpointManager
    from nitp_titan.job.fingerprint import fingerprint
    from nitp_titan.training.ending import ending
    from nitp_titan.training.interrupt import Interruption
    from nitp_titan.training.run_record import RunRecord

    init_logger()
    for note in job.notes:
        logger.info(note)
    is_first = os.environ["RANK"] == "0"
    run_folder = Path(config.dump_folder)
    seeds = config.checkpoint.create_seed_checkpoint
    record = RunRecord(run_folder, config.training.steps, locks=not seeds)
    changes: list[str] = []
    trainer = None
    try:
        try:
            trainer = config.build(when_connected=lambda: changes.extend(_begin(record, config, job)))
        except ValueError as error:
            # What the checks of the job could not see: it takes the data, the tokenizer or the model itself.
            raise JobError([Problem(job.file, "", str(error))]) from error
        if isinstance(trainer.checkpointer, CheckpointManager):
            # The first rank's is the one that is saved and compared.
            trainer.checkpointer.fingerprint = fingerprint(job) if is_first else {}
            trainer.checkpointer.said_elsewhere = {change.partition(" ")[0] for change in changes}
        if seeds:
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            record.follow(trainer)
            trainer.changes = changes
            trainer.interruption = Interruption(signals)
            trainer.interruption.join(
                _get_default_store(), torch.distributed.get_rank(), torch.distributed.get_world_size()
            )
            signals.raising = False
            trainer.train()
            if not trainer.steps_run and not trainer.out_of_data and trainer.interruption.signal is None:
                logger.warning(
                    f"Nothing to train: {run_folder} is at step {trainer.step} of {config.training.steps}. "
                    "Set more training.steps, or another job.dump_folder"
                )
            trainer.interruption.close()
    except Interrupted as name:
        record.finish("interrupted", f"{name} before the first step")
        raise
    except BaseException as error:
        if trainer is not None:
            trainer.interruption.abandon()
        end = ending(error)
        record.finish(end.state, end.reason, end.exit_code)
        raise
    finally:
        if trainer is not None:
            trainer.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    outcome = trainer.interruption.outcome
    record.finish("interrupted" if outcome else "completed", outcome or None)
    if is_first:
        held = ", ".join(sorted(path.name for path in run_folder.iterdir()))
        logger.info(outcome or f"Run folder: {run_folder} ({held})")


def _begin(record: RunRecord, config: NITPTrainer.Config, job: Job) -> list[str]:
    """Make the run's folder, once the ranks can communicate; return what differs from the run's earlier start."""
    from torchtitan.observability import structured_logger

    from nitp_titan.job.earlier import RESOLVED, changes_since, write_beside_earlier

    resolved = Path(config.dump_folder) / RESOLVED
    changes: list[str] = []

    def write() -> None:
        changes.extend(changes_since(resolved, job))
        write_beside_earlier(job, resolved)

    record.claim(write)
    structured_logger.init_structured_logger(
        source="training", output_dir=config.dump_folder, enable=config.debug.enable_structured_logging
    )
    return changes


if __name__ == "__main__":
    sys.exit(main())
