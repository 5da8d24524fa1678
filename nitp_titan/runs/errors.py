"""Why a run ends that is nobody's bug: one line, and the exit code."""

from __future__ import annotations


class RunError(Exception):
    """A run that cannot begin or go on; the message is one line. ``exit_code`` is what the worker ends with."""

    exit_code = 1


class FolderInUseError(RunError):
    """Another process trains in the run's folder."""

    exit_code = 2


class DiskError(RunError):
    """What the run has to write cannot be written: the disk is full, read-only, or says no."""
