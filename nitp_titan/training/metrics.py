"""Metrics beside TorchTitan's: more values on its lines and events, and a ``metrics.jsonl`` in the run folder."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed
from torchtitan.components import metrics as upstream
from torchtitan.tools.logging import logger

from nitp_titan.runs.tags import (
    EFFECTIVE_RANK,
    MAX_LOAD,
    MEAN_COSINE,
    METRICS_FILE,
    NITP,
    NTP,
    VALIDATION_NITP,
    VALIDATION_NTP,
    VALIDATION_TOTAL,
)
from nitp_titan.training.tolerant import TolerantLogger, warn_unwritten

_ON_CONSOLE = {
    NTP: "ntp: {:8.5f}",
    NITP: "nitp: {:7.5f}",
    VALIDATION_NTP: "ntp: {:7.4f}",
    VALIDATION_NITP: "nitp: {:7.4f}",
    EFFECTIVE_RANK: "rank: {:.1f}",
    MEAN_COSINE: "cosine: {:.3f}",
    MAX_LOAD: "max_load: {:.2f}",
}
"""What a console line shows of the additional metrics, and how."""


class JsonlLogger(upstream.BaseLogger):
    """Writes one object a logging step: ``step`` and the TensorBoard tags. Non-finite values are null.

    What is logged later of the same step, a validation say, joins its line. A resumed run replaces what an earlier
    one wrote of its first step and after.
    """

    def __init__(self, path: str):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # Appending, since a resumed run goes on in its folder; unbuffered, so that a killed one leaves whole lines.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._last: dict[str, Any] = {}
        self._last_starts = 0

    def log(self, metrics: dict[str, Any], step: int) -> None:
        values = {tag: float(value) for tag, value in metrics.items()}
        values = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        if self._last.get("step") != step:
            self._last_starts = self._end_before(step) if not self._last else os.fstat(self._file.fileno()).st_size
            self._last = {"step": step}
        self._file.truncate(self._last_starts)
        self._last |= values
        line = (json.dumps(self._last) + "\n").encode()
        if self._file.write(line) < len(line):
            # A disk that is full takes a part, and says so at the next write. No half line stays.
            self._file.truncate(self._last_starts)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def _end_before(self, step: int) -> int:
        """Return where the lines of earlier steps end; a line that a killed run left half written ends them too."""
        end = 0
        with open(self._file.name, "rb") as lines:
            for line in lines:
                try:
                    earlier = json.loads(line)["step"] < step
                except (ValueError, KeyError, TypeError):
                    earlier = False
                if not earlier:
                    break
                end += len(line)
        return end

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
        super().__init__(config, **kwargs)
        self.sources: list[Callable[[], dict[str, float]]] = []
        self.validation_sources: list[Callable[[float], dict[str, float]]] = []

    def _build_metric_logger(self, **kwargs: Any) -> upstream.BaseLogger:
        config, folder = kwargs["config"], kwargs["dump_folder"]
        events = os.path.join(folder, config.save_tb_folder)
        try:
            loggers = super()._build_metric_logger(**kwargs)
        except OSError as error:
            warn_unwritten(events, error)
            loggers = super()._build_metric_logger(**kwargs | {"config": replace(config, enable_tensorboard=False)})
        if isinstance(loggers, upstream.LoggerContainer):
            loggers._loggers = [TolerantLogger(inner, events) for inner in loggers._loggers]
        rank = upstream._get_metrics_rank(parallel_dims=kwargs["parallel_dims"], pp_schedule=kwargs["pp_schedule"])
        if torch.distributed.get_rank() != rank:
            return loggers
        if not isinstance(loggers, upstream.LoggerContainer):
            loggers = upstream.LoggerContainer()
        lines = os.path.join(folder, METRICS_FILE)
        try:
            loggers.add_logger(TolerantLogger(JsonlLogger(lines), lines))
        except OSError as error:
            warn_unwritten(lines, error)
        return loggers

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log a step as TorchTitan does, with what the sources have."""
        added: dict[str, float] = {NTP: global_avg_loss}
        for source in self.sources:
            added.update(source())
        # Stock TorchTitan's total is its NTP loss: for events and files alone, where runs are compared.
        shown = added if NITP in added else {tag: value for tag, value in added.items() if tag != NTP}
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
