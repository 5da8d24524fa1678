"""A metrics or TensorBoard file that cannot be written is warned of once, and training goes on."""

from __future__ import annotations

import errno
import json
import os
import resource
import threading

import pytest
from torchtitan.components.metrics import BaseLogger, TensorBoardLogger

from nitp_titan.training.metrics import JsonlLogger
from nitp_titan.training.tolerant import TolerantLogger
from tests.helpers.trainers import metric_lines, running, trainer_config


class Full(BaseLogger):
    def log(self, metrics, step):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self):
        self.log({}, 0)


def test_an_error_of_the_disk_is_told_once_and_any_other_raised(caplog):
    logger = TolerantLogger(Full(), "runs/tb")
    for step in (1, 2):
        logger.log({"loss": 1.0}, step)
    logger.close()
    [line] = [record.getMessage() for record in caplog.records]
    assert line == "runs/tb cannot be written: No space left on device. The training goes on without it"
    with pytest.raises(TypeError):
        TolerantLogger(None, "x").log()  # pyrefly: ignore [bad-argument-type, missing-argument]


def test_a_file_that_has_no_more_room_keeps_whole_lines(tmp_path, caplog):
    """With a real limit, of which the kernel writes what still fits."""
    path = tmp_path / "metrics.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    logger = TolerantLogger(JsonlLogger(str(path)), str(path))
    logger.log({"loss": 1.0}, 1)
    size = path.stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, before[1]))
        logger.log({"loss": 2.0}, 2)
        logger.log({"loss": 3.0}, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.stat().st_size == size
    # There is room again.
    logger.log({"loss": 4.0}, 4)
    logger.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 4]
    assert len(caplog.records) == 1


def test_tensorboards_thread_says_nothing_on_its_own(tmp_path, capfd):
    inner = TensorBoardLogger(str(tmp_path))
    logger = TolerantLogger(inner, "tb")
    writer = inner.writer.file_writer.event_writer._async_writer

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer._writer.write = full
    writer._writer.flush = full
    for step in range(3):
        logger.log({"loss": 1.0}, step)
    writer._worker.join(5)
    logger.log({"loss": 1.0}, 4)
    logger.close()
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook.is_ours


def test_a_run_whose_events_have_no_folder_trains(tmp_path, corpus):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tb").write_text("a file")
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with running(trainer_config(tmp_path / "run", corpus)) as trainer:
        trainer.train()
        assert trainer.step == 4
    assert (tmp_path / "run" / "metrics.jsonl").is_dir()
    with running(trainer_config(tmp_path / "other", corpus)) as trainer:
        trainer.train()
    assert len(metric_lines(tmp_path / "other")) == 4
