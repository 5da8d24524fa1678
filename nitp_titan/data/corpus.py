"""What a dataset name means: names, paths and hub repositories to documents."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from nitp_titan.data.documents import ArrowDocuments, Documents, ListDocuments, ProcessedDocuments
from nitp_titan.data.errors import DataError
from nitp_titan.data.files import file_format, find_text_files, nearest_name, stdlib_files
from nitp_titan.data.readers import (
    check_text,
    first_line,
    missing_field,
    parquet_problem,
    read_documents,
    read_jsonl,
)

logger = logging.getLogger(__name__)

HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class DocumentCorpus:
    """A map-style corpus: any document by its number."""

    name: str
    """For messages: the dataset and where it lies."""

    documents: Documents

    @property
    def size(self) -> int:
        """Number of documents."""
        return len(self.documents)


@dataclass(frozen=True)
class ShardedCorpus:
    """A corpus that is read in order, shard by shard."""

    name: str
    """For messages: the dataset and where it lies."""

    size: int
    """Number of shards."""

    read: Callable[[int, int], Iterator[str]]
    """(shard, start) -> texts of that shard from its document number `start` on, the same at every call."""


Corpus = DocumentCorpus | ShardedCorpus


def dataset_names() -> list[str]:
    """Names that `open_corpus` takes, beside "hub:owner/name"."""
    return ["text", "python_stdlib", *_registry()]


def open_corpus(
    dataset: str,
    dataset_path: str | None = None,
    *,
    text_field: str = "text",
    split: str = "train",
    streaming: bool = False,
) -> Corpus:
    """Open a corpus by name, and log what was found and how long it took.

    Args:
        dataset: "text" (files of `dataset_path`), "python_stdlib", a name of TorchTitan's registry (c4, c4_test,
            c4_validation; `dataset_path` replaces their path), or "hub:owner/name" or "hub:owner/name:config".
        dataset_path: see `files.find_text_files`.
        text_field: key or column of the text in .jsonl and .parquet files and in hub data sets.
        split: of a hub data set.
        streaming: read in order from the source rather than through a memory-mapped Arrow copy in the cache of
            `datasets`. A shard of "text" is a file. The registry decides for itself.

    Raises:
        DataError: an unknown name, a path that matches nothing, data that cannot be read or that is not text.
    """
    began = time.perf_counter()
    if dataset == "text":
        if not dataset_path:
            raise DataError("dataset = 'text' needs dataset_path: a file, a folder or a glob of text files")
        corpus, files = _open_files(dataset_path, text_field, streaming)
    elif dataset == "python_stdlib":
        paths = stdlib_files()
        texts = [text for text in (path.read_bytes() for path in paths) if text]
        corpus, files = DocumentCorpus("python_stdlib", ListDocuments(texts)), len(paths)
    elif dataset.startswith(HUB_PREFIX):
        corpus, files = _open_hub(dataset, text_field, split, streaming), None
    elif dataset in _registry():
        corpus, files = _open_registered(dataset, dataset_path), None
    else:
        names = dataset_names()
        raise DataError(
            f"unknown dataset {dataset!r}{nearest_name(dataset, names)}: expected one of {', '.join(names)}, "
            f"or {HUB_PREFIX}owner/name for a data set of the Hugging Face hub"
        )
    if corpus.size == 0:
        raise DataError(f"dataset {corpus.name} has no document with text in it")
    logger.info(
        "dataset %s: %d %s%s, opened in %.1f s",
        corpus.name,
        corpus.size,
        "documents" if isinstance(corpus, DocumentCorpus) else "shards",
        f" in {files} files" if files else "",
        time.perf_counter() - began,
    )
    return corpus


def _open_files(dataset_path: str, text_field: str, streaming: bool) -> tuple[Corpus, int]:
    files = find_text_files(dataset_path)
    name = f"text ({dataset_path})"
    if streaming:
        for file in files:
            if file_format(file) == "parquet" and (problem := parquet_problem(file, text_field)):
                raise DataError(problem)
        return ShardedCorpus(name, len(files), lambda i, start: read_documents(files[i], text_field, start)), len(files)
    # One column per format, in the order of each format's first file: one load a format however many files there are.
    by_format: dict[str, list[Path]] = {}
    for file in files:
        by_format.setdefault(file_format(file), []).append(file)
    load = {"text": _load_txt, "json": _load_jsonl, "parquet": _load_parquet}
    columns = [load[kind](paths, text_field) for kind, paths in by_format.items()]
    return DocumentCorpus(name, ArrowDocuments(columns)), len(files)


def _load(builder: str, paths: list[Path], **options) -> datasets.Dataset:
    # `datasets` takes every path for a pattern: names with brackets or stars must be quoted.
    quoted = [_quote(str(path.absolute())) for path in paths]
    return datasets.load_dataset(builder, data_files=quoted, split="train", **options)


def _load_txt(paths: list[Path], text_field: str):
    try:
        return _column(_load("text", paths, sample_by="document"), "text")
    except Exception as error:
        _name_bad_file(paths, text_field)
        raise DataError(f"text files could not be read: {_cause(error)}") from error


def _load_jsonl(paths: list[Path], text_field: str):
    """The fast reader of `datasets` where it can; line by line where lines differ in their other fields.

    The fast one needs one schema for all files, so blank lines, a field that only some lines have or an object
    with other keys can fail it. The slow one does not look at other fields, and knows the line of what is wrong.
    """
    try:
        dataset = _load("json", paths)
        is_text = dataset.features.get(text_field) == datasets.Value("string")
        # A string column may have been completed with nulls where a file lacks the field: those are errors too.
        if is_text and _column(dataset, text_field).null_count == 0:
            return _column(dataset, text_field)
    except Exception as error:
        logger.info("the .jsonl files do not share one schema (%s): reading them line by line", _cause(error))
    # Size and time are in the cache's fingerprint, so that an edited file is read again.
    stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    options = {"paths": [str(path.absolute()) for path in paths], "text_field": text_field, "stamps": stamps}
    features = datasets.Features({"text": datasets.Value("string")})
    try:
        return _column(datasets.Dataset.from_generator(_jsonl_rows, features=features, gen_kwargs=options), "text")
    except Exception as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        raise DataError(str(cause) if isinstance(cause, DataError) else _cause(error)) from error


def _jsonl_rows(paths: list[str], text_field: str, stamps: list) -> Iterator[dict[str, str]]:
    for path in paths:
        for text in read_jsonl(path, text_field):
            yield {"text": text}
    yield {"text": ""}  # `datasets` cannot hold a table without rows; empty documents are left out later


def _load_parquet(paths: list[Path], text_field: str):
    for path in paths:
        if problem := parquet_problem(path, text_field):
            raise DataError(problem)
    paths = [path for path in paths if pq.read_metadata(path).num_rows]
    if not paths:  # `datasets` cannot hold a table without rows
        return pa.chunked_array([], type=pa.string())
    try:
        column = _column(_load("parquet", paths, columns=[text_field]), text_field)
    except Exception as error:
        _name_bad_file(paths, text_field)
        raise DataError(f"parquet files could not be read: {_cause(error)}") from error
    if column.null_count:
        _name_bad_file(paths, text_field)
    return column


def _open_hub(dataset: str, text_field: str, split: str, streaming: bool) -> Corpus:
    repository, _, config = dataset.removeprefix(HUB_PREFIX).partition(":")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise DataError(f"dataset {dataset!r}: expected {HUB_PREFIX}owner/name or {HUB_PREFIX}owner/name:config")
    try:
        opened = datasets.load_dataset(repository, config or None, split=split, streaming=streaming)
    except Exception as error:
        raise DataError(
            f"dataset {dataset!r}, split {split!r}, could not be opened: {_cause(error)}. Check the name, the "
            f"configuration ({HUB_PREFIX}{repository}:NAME) and the split; a private data set needs `hf auth login`. "
            "On a machine without a network, copy the files there and use dataset = 'text' with dataset_path."
        ) from error
    columns = opened.column_names
    if columns is not None and text_field not in columns:
        raise DataError(missing_field(f"dataset {dataset!r}", text_field, columns))
    if isinstance(opened, datasets.IterableDataset):
        if columns is not None:
            opened = opened.select_columns([text_field])
        return _sharded(dataset, opened, lambda row: _hub_text(row, text_field, dataset))
    if opened.data.num_rows != len(opened):  # rows chosen by an index: make the table hold just those
        opened = opened.flatten_indices()
    kind = opened.features[text_field]
    if kind not in (datasets.Value("string"), datasets.Value("large_string")):
        check_text(opened[0][text_field], f"dataset {dataset!r}, row 0", text_field)
        raise DataError(f"dataset {dataset!r}: {text_field!r} holds {kind}, expected text")
    # Nobody can edit a hub data set for one null row: those are left out, as empty documents are.
    return DocumentCorpus(dataset, ArrowDocuments([_column(opened, text_field)]))


def _open_registered(dataset: str, dataset_path: str | None) -> Corpus:
    entry = _registry()[dataset]
    path = dataset_path or entry.path
    try:
        opened = entry.loader(path)
    except Exception as error:
        raise DataError(
            f"dataset {dataset!r} could not be opened from {path!r}: {_cause(error)}. Without a network, point "
            "dataset_path at a local copy, or use dataset = 'text' or 'python_stdlib'."
        ) from error
    name = f"{dataset} ({path})"
    if isinstance(opened, datasets.IterableDataset):
        return _sharded(name, opened, entry.sample_processor)
    return DocumentCorpus(name, ProcessedDocuments(opened, entry.sample_processor))


def _sharded(name: str, dataset: datasets.IterableDataset, processor: Callable[[dict], str]) -> ShardedCorpus:
    count = dataset.num_shards

    def read(shard: int, start: int) -> Iterator[str]:
        part = dataset.shard(num_shards=count, index=shard)
        yield from map(processor, part.skip(start) if start else part)

    return ShardedCorpus(name, count, read)


def _hub_text(row: dict[str, Any], text_field: str, dataset: str) -> str:
    if text_field not in row:
        raise DataError(missing_field(f"dataset {dataset!r}", text_field, row))
    return "" if row[text_field] is None else check_text(row[text_field], f"dataset {dataset!r}", text_field)


def _registry() -> dict[str, Any]:
    """TorchTitan's text data sets; imported here because its next release moves them."""
    from torchtitan.hf_datasets.text_datasets import DATASETS

    return DATASETS


def _column(dataset: datasets.Dataset, name: str):
    """A column as Arrow, memory-mapped, (rows,) string."""
    return dataset.data.column(name)


def _name_bad_file(paths: list[Path], text_field: str) -> None:
    """Read the files again, in order, for the DataError that names the file and the line."""
    for path in paths:
        for _ in read_documents(path, text_field):
            pass


def _quote(path: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def _cause(error: BaseException) -> str:
    """The first line of what went wrong at the bottom: `datasets` wraps it in one that says nothing."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}".rstrip(".")
