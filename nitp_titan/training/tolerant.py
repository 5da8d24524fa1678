"""Metrics whose file cannot be written: a line of warning, once, and the training goes on."""

from __future__ import annotations

import threading
from typing import Any

from torchtitan.components.metrics import BaseLogger
from torchtitan.tools.logging import logger


class TolerantLogger(BaseLogger):
    """Another logger, of which an error of the disk is told once. It is tried again: a full disk may be emptied."""

    def __init__(self, inner: BaseLogger, what: str):
        """Wrap a logger.

        Args:
            what: what it writes, for the warning.
        """
        self._inner, self._what, self._told = inner, what, False
        _be_quiet_in_threads()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        try:
            self._inner.log(metrics, step)
        except OSError as error:
            self._tell(error)

    def go_on_from(self, step: int, *, saves: bool) -> None:
        """Have what was logged of later steps than this one be void, where the other logger can."""
        try:
            if go_on_from := getattr(self._inner, "go_on_from", None):
                go_on_from(step, saves=saves)
        except OSError as error:
            self._tell(error)

    def close(self) -> None:
        try:
            self._inner.close()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            warn_unwritten(self._what, error)


def warn_unwritten(what: str, error: OSError) -> None:
    """Say that metrics are lost."""
    logger.warning(f"{what} cannot be written: {error.strerror or error}. The training goes on without it")


def _be_quiet_in_threads() -> None:
    """Leave out the traceback of TensorBoard's writing thread, whose error comes to the one that logs as well."""
    before = threading.excepthook
    if getattr(before, "is_ours", False):
        return

    def hook(arguments: threading.ExceptHookArgs) -> None:
        thread = type(arguments.thread).__name__
        if not (thread == "_AsyncWriterThread" and issubclass(arguments.exc_type, OSError)):
            before(arguments)

    hook.is_ours = True  # pyrefly: ignore [missing-attribute]
    threading.excepthook = hook
