"""Our commands as a user calls them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nitp_titan.cli import main as cli
from tests.helpers.trainers import metric_lines

ROOT = Path(__file__).parent.parent.parent


def call(*words: str, entry: tuple[str, ...] = (sys.executable, "-m", "nitp_titan.train"), **environment: str):
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in unset} | environment
    return subprocess.run([*entry, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


def debug_job(folder: Path, *words: str) -> tuple[str, ...]:
    return (
        "--job.config_file=train_configs/debug.toml",
        "--job.dump_folder",
        str(folder),
        "--training.seq_len=64",
        "--metrics.log_freq=1",
        "--checkpoint.interval=2",
        "--lr_scheduler.total_steps=4",
        *words,
    )


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss_metrics/global_avg_loss"] for line in metric_lines(folder)}


def cli_main(capsys: Any, *arguments: str) -> tuple[Any, str, str]:
    """Run ``nitp-titan`` in this process; return exit code, standard output and error."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err
