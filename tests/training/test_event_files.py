"""TensorBoard events of a run that was killed and started again, read as TensorBoard and as we read them."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nitp_titan.runs.scalars import read_scalars
from nitp_titan.training import event_files
from nitp_titan.training.event_files import TensorBoardLogger, folder_of_events


@pytest.fixture(autouse=True)
def starts(monkeypatch):
    """Each start is a minute after the last one: TensorBoard reads a folder's files in the order of their names."""
    now = [time.time()]

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(now[0])

    def clock() -> float:
        now[0] += 60
        return now[0]

    monkeypatch.setattr(event_files, "datetime", Clock)
    monkeypatch.setattr("time.time", clock)


def started(run: Path, last_step: int, values: dict[int, float]) -> TensorBoardLogger:
    logger = TensorBoardLogger(folder_of_events(run / "tb"))
    logger.go_on_from(last_step)
    for step, value in values.items():
        logger.log({"a": value, "b": -value} if step != 4 else {"a": value}, step)
    return logger


def shown(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), {"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_killed_and_resumed_run_is_one_curve(tmp_path):
    # Never closed, as a run that is killed.
    killed = started(tmp_path, 0, dict.fromkeys(range(1, 7), 1.0))
    again = started(tmp_path, 3, {5: 2.0, 10: 2.0})
    [folder] = (tmp_path / "tb").iterdir()
    assert len(list(folder.iterdir())) == 2
    curve = [(1, 1.0), (2, 1.0), (3, 1.0), (5, 2.0), (10, 2.0)]
    assert shown(folder, "a") == curve
    assert read_scalars(tmp_path) == {"a": curve, "b": [(step, -value) for step, value in curve]}
    third = started(tmp_path, 0, {1: 3.0})
    assert shown(folder, "b") == [(1, -3.0)]
    assert read_scalars(tmp_path) == {"a": [(1, 3.0)], "b": [(1, -3.0)]}
    for logger in (killed, again, third):
        logger.close()


def test_a_run_goes_on_in_the_last_of_the_folders_that_it_has(tmp_path):
    for name in ("20250101-0000", "20250102-0000", "20250103-0000.bak", "profile"):
        (tmp_path / name).mkdir()
    (tmp_path / "20250104-0000").touch()
    assert folder_of_events(tmp_path) == tmp_path / "20250102-0000"
    assert folder_of_events(tmp_path / "new").parent == tmp_path / "new"
