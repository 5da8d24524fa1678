"""The data of a job: known names, paths that match something, and first rows that are text."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nitp_titan.data.files import find_text_files
from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, did_you_mean, one_of, quote

if TYPE_CHECKING:
    from nitp_titan.data.bad_text import OnBadText

DATASETS = ("text", "python_stdlib", "c4", "c4_test", "c4_validation")

_FILES = 16  # of a data set whose first rows are read


def check_data(draft: Draft) -> Iterator[Problem]:
    """The data set has a known name, its path matches something, and what it matches begins with text."""
    yield from _check_data(draft, "dataloader")


def check_validation_data(draft: Draft) -> Iterator[Problem]:
    """The same of the validation data, where it is another."""
    table = "validator.dataloader"
    keys = ("dataset", "dataset_path", "text_field", "on_bad_text")
    same = all(draft.get(table, key) == draft.get("dataloader", key) for key in keys)
    if not same or not draft.is_default(table, "dataset"):
        yield from _check_data(draft, table)


def _check_data(draft: Draft, table: str) -> Iterator[Problem]:
    dataset, path = draft.get(table, "dataset"), draft.get(table, "dataset_path")
    if path is not None and (dataset == "python_stdlib" or dataset.startswith("hub:")):
        hint = 'did you mean dataset = "text"?'
        yield draft.problem(table, "dataset_path", f"found {quote(path)}, which {quote(dataset)} does not read", hint)
    if dataset.startswith("hub:"):
        if not re.fullmatch(r"hub:[^\s/:]+/[^\s/:]+(:[^\s/:]+)?", dataset):
            yield draft.problem(table, "dataset", f'found {quote(dataset)}, expected "hub:owner/name"')
        return
    if dataset not in DATASETS:
        expected = f'expected {one_of(DATASETS)}, or "hub:owner/name"'
        hint = did_you_mean(dataset, DATASETS)
        if not hint and "/" in dataset:
            hint = f'did you mean "hub:{dataset}", or dataset = "text" with dataset_path = {quote(dataset)}?'
        yield draft.problem(table, "dataset", f"found {quote(dataset)}, {expected}", hint)
    elif dataset == "text" and path is None:
        yield draft.problem(
            table, ("dataset_path", "dataset"), 'expected a file, folder or glob of text files with dataset = "text"'
        )
    elif dataset == "text":
        key, message = _problem_of_files(draft, table, path)
        if message:
            yield draft.problem(table, (key, "dataset_path", "dataset"), message)


def _problem_of_files(draft: Draft, table: str, path: str) -> tuple[str, str]:
    """Return what is wrong with the files of a path, and the key that can mend it; two empty strings if nothing is."""
    logger = logging.getLogger("nitp_titan.data.files")
    disabled, logger.disabled = logger.disabled, True  # its warnings are for the run
    try:
        files = find_text_files(path)
    except ValueError as error:
        return "dataset_path", str(error).removeprefix("dataset_path: ")
    finally:
        logger.disabled = disabled
    return _problem_of_first_rows(path, files, draft.get(table, "text_field"), draft.get(table, "on_bad_text"))


def _problem_of_first_rows(path: str, files: list[Path], text_field: str, on_bad_text: OnBadText) -> tuple[str, str]:
    """Look at a few files, spread over all of them, so that a large data set takes no longer than a small one."""
    from nitp_titan.data.readers import first_problem

    looked_at = files[:: -(-len(files) // _FILES)]
    empty = 0
    for file in looked_at:
        problem, is_empty = first_problem(file, text_field, on_bad_text)
        if problem:
            return "text_field" if "(text_field)" in problem else "dataset_path", problem
        empty += is_empty
    if empty == len(files):
        return "dataset_path", f"found {quote(path)}, which has no document with text in it"
    return "", ""
