"""Errors of the disk, as one line; and nothing left of a save that has failed."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from nitp_titan.checkpoints.folder import saving
from nitp_titan.runs.errors import DiskError

_WHAT_TO_DO = {
    errno.ENOSPC: "free space there, or give another job.dump_folder",
    errno.EDQUOT: "free space there, or give another job.dump_folder",
    errno.EFBIG: "the process or the file system allows no file of that size (ulimit -f)",
    errno.EROFS: "mount it for writing, or give another job.dump_folder",
    errno.EACCES: "give this user the right to write there, or give another job.dump_folder",
    errno.EPERM: "give this user the right to write there, or give another job.dump_folder",
    errno.ENOTDIR: "remove the file that stands where a folder is wanted",
    errno.EEXIST: "remove the file that stands where a folder is wanted",
    errno.EISDIR: "remove the folder that stands where a file is wanted",
}
_OF_DISKS = (*_WHAT_TO_DO, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENAMETOOLONG, errno.EMFILE)
# What torch's own writer says where it has no error number.
_TORCH_WRITES = ("PytorchStreamWriter failed", "file write failed", "iostream error", "unexpected pos ")


def disk_error(error: BaseException, where: Path | str) -> DiskError:
    """Return an error of the operating system as one line."""
    path = error.filename if isinstance(error, OSError) and error.filename else where
    return DiskError(f"{path} cannot be written: {_why(error)}")


def _why(error: BaseException) -> str:
    if not isinstance(error, OSError):
        return "a file was cut short; is the disk full, a quota used up, or a file's size limited (ulimit -f)?"
    hint = _WHAT_TO_DO.get(error.errno or 0)
    return (error.strerror or str(error)) + (f"; {hint}" if hint else "")


def is_of_the_disk(error: BaseException) -> bool:
    """Whether an exception says that something could not be written (or, of a number that both have, read)."""
    if isinstance(error, OSError):
        return error.errno in _OF_DISKS
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_WRITES)


@contextlib.contextmanager
def whole_or_nothing(checkpoint: Path) -> Iterator[None]:
    """Inside, a checkpoint is written beside its place. If that fails, what there is of it is removed.

    Raises:
        DiskError: the disk is to blame. On all ranks alike, since torch tells each of them of all failures.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        shutil.rmtree(saving(checkpoint), ignore_errors=True)
        if (cause := _cause(error)) is None:
            raise
        path = f"{cause.filename}: " if isinstance(cause, OSError) and cause.filename else ""
        raise DiskError(f"The checkpoint {checkpoint} is not saved: {path}{_why(cause)}") from error


def _cause(error: BaseException) -> BaseException | None:
    """Return what the disk has said: on this rank or, as torch gathers them, on any."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, OSError) and is_of_the_disk(one):
            return one
        if isinstance(one, CheckpointException):
            waiting += [failure for failure, _ in one.failures.values()]
        waiting += [other for other in (one.__cause__, one.__context__) if other is not None]
    return error if isinstance(error, RuntimeError) and is_of_the_disk(error) else _torch_cause(error)


def _torch_cause(error: BaseException) -> BaseException | None:
    """Return a writer's error among a failed save's, which has no number."""
    failures = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
    return next((failure for failure in failures if is_of_the_disk(failure)), None)
