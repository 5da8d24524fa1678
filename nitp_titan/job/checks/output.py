"""The folder of a run can be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote


def check_output(draft: Draft) -> Iterator[Problem]:
    """The run's folder can be one."""
    folder = draft.get("job", "dump_folder")
    if "://" in folder:
        yield draft.problem("job", "dump_folder", f"found {quote(folder)}, expected a folder of this machine")
        return
    path = Path(folder)
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    if not folder.strip():
        yield draft.problem("job", "dump_folder", f"found {quote(folder)}, expected a folder's name")
    elif folder.startswith("~"):
        yield draft.problem("job", "dump_folder", f'found {quote(folder)}: "~" is not expanded, write the path out')
    elif not existing.is_dir():
        which = "which is a file" if existing == path else f"but {existing} is a file"
        yield draft.problem("job", "dump_folder", f"found {quote(folder)}, {which}; expected a folder's name")
    elif not os.access(existing, os.W_OK):
        yield draft.problem("job", "dump_folder", f"found {quote(folder)}, but {existing} cannot be written to")
