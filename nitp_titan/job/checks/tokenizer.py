"""The tokenizer of a job: its files, the tokens around a document, and its ids against the model's vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitp_titan.data.errors import DataError
from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote

if TYPE_CHECKING:
    from nitp_titan.data.tokenizer_folder import TokenizerFolder

BYTE_VOCABULARY = 258
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


def check_tokenizer(draft: Draft) -> Iterator[Problem]:
    """The tokenizer can be read, has the tokens that the job names, and every id has an embedding."""
    if draft.get("tokenizer", "name") == "byte":
        yield from _check_byte_tokenizer(draft)
        return
    table = {key: draft.get("tokenizer", key) for key in ("bos_token", "eos_token")}
    folder = draft.get("model", "hf_assets_path")
    try:
        read = _read(folder, table)
    except DataError as error:
        yield draft.problem("model", "hf_assets_path", str(error))
        return
    if read is None:
        return
    from nitp_titan.data.tokenizer_folder import documents_get

    for key, problem in read.problems.items():
        # A file of the folder may be what names it.
        place = ("tokenizer", key) if table[key] else ("model", "hf_assets_path")
        yield draft.problem(*place, problem if table[key] else f"{key}: {problem}")
    for name, token in (("bos", read.bos), ("eos", read.eos)):
        if f"{name}_token" in read.problems:
            continue
        key = f"add_{name}"
        try:
            documents_get(name, draft.get("tokenizer", key), token and token.id)
        except DataError as error:
            yield draft.problem("tokenizer", key, str(error).removeprefix(f"tokenizer.{key}: "))
    yield from _check_size(draft, "model", "hf_assets_path", str(Path(folder, TOKENIZER_FILES[0])), read.largest_id)


def _check_byte_tokenizer(draft: Draft) -> Iterator[Problem]:
    for key in ("bos_token", "eos_token", "allow_special_in_text"):
        if found := draft.get("tokenizer", key):
            expected = "false" if found is True else quote(None)
            reason = "text is bytes to it" if found is True else "its begin and end tokens are its own"
            message = f'found {quote(found)}, expected {expected} with name = "byte": {reason}'
            yield draft.problem("tokenizer", key, message)
    yield from _check_size(draft, "tokenizer", "name", "the byte tokenizer", BYTE_VOCABULARY - 1)


def _check_size(draft: Draft, table: str, key: str, what: str, largest_id: int) -> Iterator[Problem]:
    vocabulary = draft.facts().vocab_size
    if largest_id >= vocabulary:
        message = f"{what} has ids up to {largest_id:,}, expected less than the model's vocabulary of {vocabulary:,}"
        yield draft.problem(table, key, message)


def check_assets(draft: Draft) -> Iterator[Problem]:
    """The tokenizer's files are there; they may be still to be downloaded when a job is checked."""
    draft.get("model", "flavor")  # an unknown flavor's defaults, the tokenizer among them, are unknown too
    if draft.get("tokenizer", "name") != "huggingface":
        return
    folder = draft.get("model", "hf_assets_path")
    if not folder:
        yield draft.problem(
            "model", "hf_assets_path", "expected the folder of a tokenizer.json", 'or set tokenizer.name = "byte"'
        )
    elif not any(Path(folder, name).is_file() for name in TOKENIZER_FILES):
        missing = "has no tokenizer.json" if Path(folder).is_dir() else "does not exist"
        yield draft.problem("model", "hf_assets_path", f"found {quote(folder)}, which {missing}")


def tokenizer_notes(folder: str, table: dict[str, Any]) -> list[str]:
    """Return what the run's log says of the tokenizer, one line each.

    Args:
        folder: ``model.hf_assets_path``.
        table: ``[tokenizer]``, of a job that has passed the checks.
    """
    read = _read(folder, table) if table["name"] == "huggingface" else None
    return read.notes(table["add_bos"], table["add_eos"]) if read else []


def _read(folder: str, table: dict[str, Any]) -> TokenizerFolder | None:
    """Read the folder's tokenizer.json; None where there is none."""
    files = [path for path in Path(folder).glob("*.json") if path.is_file()] if folder else []
    if not any(path.name == TOKENIZER_FILES[0] for path in files):
        return None
    stamps = tuple(sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files))
    return _read_once(folder, table["bos_token"], table["eos_token"], stamps)


@functools.lru_cache(maxsize=2)
def _read_once(folder: str, bos_token: str | None, eos_token: str | None, stamps: tuple) -> TokenizerFolder:
    """Read a large vocabulary, which takes tenths of a second, once a process, unless a file has changed."""
    from nitp_titan.data.tokenizer_folder import read_folder

    return read_folder(folder, bos_token=bos_token, eos_token=eos_token)
