"""TensorBoard events of a run that may be started several times: one folder, and each step once."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2
from torchtitan.components import metrics as upstream

_OF_A_START = re.compile(r"\d{8}-\d{4}")
"""Name of TorchTitan's folder for the events of a start: its time."""


class TensorBoardLogger(upstream.TensorBoardLogger):
    """TorchTitan's, which goes on in the folder of an earlier start: TensorBoard draws one curve for each folder.

    What is logged is on disk at once: a killed run has the points of every step before its last checkpoint.
    """

    def __init__(self, folder: Path, tag: str | None = None):
        self._goes_on = any(folder.glob("events.out.tfevents.*"))
        super().__init__(str(folder), tag)

    def go_on_from(self, step: int, *, saves: bool = True) -> None:
        """Say that what earlier starts logged of later steps than this one is void, as TensorBoard understands it."""
        if self._goes_on:
            # What SummaryWriter writes for purge_step, which it wants to know before the checkpoint is read.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            for what in ({"file_version": "brain.Event:2"}, {"session_log": start}):
                self.writer.file_writer.add_event(event_pb2.Event(step=step + 1, **what))
            self.writer.flush()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Write a step's metrics."""
        super().log(metrics, step)
        self.writer.flush()


def folder_of_events(root: Path) -> Path:
    """Return the folder of the last start, or one for this start where it is the first."""
    starts = [path for path in root.glob("*") if _OF_A_START.fullmatch(path.name) and path.is_dir()]
    return max(starts) if starts else root / datetime.now().strftime("%Y%m%d-%H%M")
