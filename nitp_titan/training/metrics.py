"""Metrics beside TorchTitan's: more values on its lines and events, and a ``metrics.jsonl`` in the run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch.distributed
from torchtitan.components import metrics as upstream
from torchtitan.tools.logging import logger

from nitp_titan.runs.metric_lines import keep_until, set_aside
from nitp_titan.runs.tags import (
    EFFECTIVE_RANK,
    MAX_LOAD,
    MEAN_COSINE,
    METRICS_FILE,
    NITP,
    NTP,
    SKIPPED_STEPS,
    VALIDATION_NITP,
    VALIDATION_NTP,
    VALIDATION_TOTAL,
)
from nitp_titan.training.event_files import TensorBoardLogger, folder_of_events
from nitp_titan.training.tolerant import TolerantLogger, warn_unwritten

_ON_CONSOLE = {
    NTP: "ntp: {:8.5f}",
    NITP: "nitp: {:7.5f}",
    VALIDATION_NTP: "ntp: {:7.4f}",
    VALIDATION_NITP: "nitp: {:7.4f}",
    EFFECTIVE_RANK: "rank: {:.1f}",
    MEAN_COSINE: "cosine: {:.3f}",
    MAX_LOAD: "max_load: {:.2f}",
    SKIPPED_STEPS: "skipped: {:.0f}",
}
"""What a console line shows of the additional metrics, and how."""


class JsonlLogger(upstream.BaseLogger):
    """Writes one object a logging step: ``step`` and the TensorBoard tags. Non-finite values are null.

    What is logged later of the same step, a validation say, joins its line.
    """

    def __init__(self, path: str):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._file = self._open(path)
        self._last: dict[str, Any] = {}
        self._last_starts = 0

    @staticmethod
    def _open(path: str) -> FileIO:
        # Appending, since a resumed run goes on in its folder; unbuffered, so that a killed one leaves whole lines.
        return open(path, "ab", buffering=0)

    def go_on_from(self, step: int, *, saves: bool) -> None:
        """Drop what earlier starts of the run logged of later steps than this one, and half a line of a killed one.

        Args:
            saves: whether this start saves checkpoints; the earlier one's are still there where it does not, and so is
                then all that it logged, in a file of its own.
        """
        path = Path(str(self._file.name))
        self._file.close()
        try:
            if saves:
                keep_until(path, step)
            elif aside := set_aside(path, step):
                logger.warning(f"This start saves no checkpoints: what earlier ones logged is {aside.name} now")
        finally:
            self._file = self._open(str(path))

    def log(self, metrics: dict[str, Any], step: int) -> None:
        values = {tag: float(value) for tag, value in metrics.items()}
        values = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        if self._last.get("step") != step:
            self._last, self._last_starts = {"step": step}, os.fstat(self._file.fileno()).st_size
        self._file.truncate(self._last_starts)
        self._last |= values
        line = (json.dumps(self._last) + "\n").encode()
        if self._file.write(line) < len(line):
            # A disk that is full takes a part, and says so at the next write. No half line stays.
            self._file.truncate(self._last_starts)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def close(self) -> None:
        self._file.close()


class MetricsProcessor(upstream.MetricsProcessor):
    """TorchTitan's metrics processor with sources of further metrics.

    A source is asked once a logging step, on every rank (it may reduce over them), and returns tag -> value.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(upstream.MetricsProcessor.Config):
        pass

    def __init__(self, config: Config, **kwargs: Any):
        self._run_loggers: list[JsonlLogger | TensorBoardLogger] = []
        super().__init__(config, **kwargs)
        self.sources: list[Callable[[], dict[str, float]]] = []
        self.as_computed: Callable[[float, float], tuple[float, ...]] = lambda *losses: losses
        self.validation_sources: list[Callable[[float], dict[str, float]]] = []

    def _build_metric_logger(self, **kwargs: Any) -> upstream.BaseLogger:
        config, run_folder = kwargs["config"], Path(kwargs["dump_folder"])
        # Its own TensorBoard logger begins another folder at each start.
        others = dataclasses.replace(config, enable_tensorboard=False)
        loggers = super()._build_metric_logger(**kwargs | {"config": others})
        if not isinstance(loggers, upstream.LoggerContainer):
            loggers = upstream.LoggerContainer()
        rank = torch.distributed.get_rank()
        speaks = rank == upstream._get_metrics_rank(
            parallel_dims=kwargs["parallel_dims"], pp_schedule=kwargs["pp_schedule"]
        )
        built: dict[Path, Callable[[], TensorBoardLogger | JsonlLogger]] = {}
        if config.enable_tensorboard and (speaks or config.save_for_all_ranks):
            of_rank = f"rank_{rank}" if config.save_for_all_ranks else ""
            root = run_folder / config.save_tb_folder
            built[root] = lambda: TensorBoardLogger(folder_of_events(root) / of_rank, kwargs.get("tag"))
        if speaks:
            lines = run_folder / METRICS_FILE
            built[lines] = lambda: JsonlLogger(str(lines))
        for path, build in built.items():
            try:
                self._run_loggers.append(tolerant := TolerantLogger(build(), str(path)))
                loggers.add_logger(tolerant)
            except OSError as error:
                warn_unwritten(str(path), error)
        return loggers

    def go_on_from(self, step: int, *, saves: bool = True) -> None:
        """Let what was logged of later steps than this one, before the run was resumed, be none of its curves."""
        for logger_of_run in self._run_loggers:
            logger_of_run.go_on_from(step, saves=saves)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log a step as TorchTitan does, with what the sources have, and its losses as they were computed."""
        global_avg_loss, global_max_loss = self.as_computed(global_avg_loss, global_max_loss)
        added: dict[str, float] = {NTP: global_avg_loss}
        for source in self.sources:
            added.update(source())
        # Stock TorchTitan's total is its NTP loss: for events and files alone, where runs are compared.
        hidden = {NTP} - added.keys() if NITP in added else {NTP}
        hidden |= {SKIPPED_STEPS} if not added.get(SKIPPED_STEPS) else set()
        shown = {tag: value for tag, value in added.items() if tag not in hidden}
        with _on_console(shown):
            super().log(step, global_avg_loss, global_max_loss, grad_norm, {**(extra_metrics or {}), **added})

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """Log a validation as TorchTitan does; ``loss`` is its mean NTP loss, which the sources may complete."""
        added: dict[str, float] = {}
        for source in self.validation_sources:
            added.update(source(loss))
        total = added.pop(VALIDATION_TOTAL, loss)
        with _on_console(added):
            super().log_validation(total, step, {**(extra_metrics or {}), **added})

    def log_values(self, step: int, values: dict[str, float]) -> None:
        """Write values of a step that is no logging step, to events and file alone."""
        self.logger.log(values, step)


@contextlib.contextmanager
def _on_console(metrics: dict[str, float]) -> Iterator[None]:
    """Inside, the lines that TorchTitan logs end with the additional metrics."""
    suffix = "".join("  " + form.format(metrics[tag]) for tag, form in _ON_CONSOLE.items() if tag in metrics)

    def complete(record: logging.LogRecord) -> bool:
        if "step:" in str(record.msg):
            record.msg = f"{record.msg}{suffix}"
        return True

    logger.addFilter(complete)
    try:
        yield
    finally:
        logger.removeFilter(complete)
