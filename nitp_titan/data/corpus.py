"""What a dataset name means: names, paths and hub repositories to documents."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets

from nitp_titan.data.arrow_copy import cause, open_copy
from nitp_titan.data.bad_text import BadText, OnBadText, done_with
from nitp_titan.data.documents import ArrowDocuments, Documents, ListDocuments, ProcessedDocuments, not_utf8
from nitp_titan.data.errors import DataError, printable
from nitp_titan.data.files import file_format, find_text_files, nearest_name, stdlib_files
from nitp_titan.data.readers import check_text, missing_field, parquet_problem, read_documents

logger = logging.getLogger(__name__)

HUB_PREFIX = "hub:"

_PLACES = 5  # of documents that are not UTF-8, in a message


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
    on_bad_text: OnBadText = "error",
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
        on_bad_text: what becomes of text that is not UTF-8, see `bad_text.BadText`.

    Raises:
        DataError: an unknown name, a path that matches nothing, data that cannot be read or that is not text, or no
            document with text in it. What is read in order is read as far as its first text; the rest is raised as
            it is drawn.
    """
    began = time.perf_counter()
    bad_text = BadText(on_bad_text)
    if dataset == "text":
        if not dataset_path:
            raise DataError("dataset = 'text' needs dataset_path: a file, a folder or a glob of text files")
        corpus, files = _open_files(dataset_path, text_field, bad_text, streaming)
    elif dataset == "python_stdlib":
        paths = stdlib_files()
        texts = [bad_text.document(path.read_bytes(), str(path)).encode() for path in paths]
        corpus, files = DocumentCorpus("python_stdlib", ListDocuments(list(filter(None, texts)))), len(paths)
    elif dataset.startswith(HUB_PREFIX):
        corpus, files = _open_hub(dataset, text_field, split, streaming, bad_text), None
    elif dataset in _registry():
        corpus, files = _open_registered(dataset, dataset_path, bad_text), None
    else:
        names = dataset_names()
        raise DataError(
            f"unknown dataset {dataset!r}{nearest_name(dataset, names)}: expected one of {', '.join(names)}, "
            f"or {HUB_PREFIX}owner/name for a data set of the Hugging Face hub"
        )
    with bad_text.forgetting():
        if not _has_text(corpus):
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


def _has_text(corpus: Corpus) -> bool:
    """Whether there is a document to train on; shards are read until one is found."""
    if isinstance(corpus, DocumentCorpus):
        return corpus.size > 0
    return any(text for shard in range(corpus.size) for text in corpus.read(shard, 0))


def _open_files(dataset_path: str, text_field: str, bad_text: BadText, streaming: bool) -> tuple[Corpus, int]:
    files = find_text_files(dataset_path)
    name = f"text ({dataset_path})"
    if streaming:
        for file in files:
            if file_format(file) == "parquet" and (problem := parquet_problem(file, text_field)):
                raise DataError(problem)
        return ShardedCorpus(
            name, len(files), lambda i, start: read_documents(files[i], text_field, start, bad_text)
        ), len(files)
    texts, places = open_copy(files, text_field, bad_text.rule)
    if count := len(places) - places.null_count:
        first = ", ".join(places.drop_null()[:_PLACES].to_pylist()) + (", ..." if count > _PLACES else "")
        done = done_with(bad_text.rule)
        logger.warning(printable(f"dataset {name}: {count} documents are not UTF-8 ({first}); {done}"))
    return DocumentCorpus(name, ArrowDocuments([texts])), len(files)


def _open_hub(dataset: str, text_field: str, split: str, streaming: bool, bad_text: BadText) -> Corpus:
    repository, _, config = dataset.removeprefix(HUB_PREFIX).partition(":")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise DataError(f"dataset {dataset!r}: expected {HUB_PREFIX}owner/name or {HUB_PREFIX}owner/name:config")
    try:
        opened = datasets.load_dataset(repository, config or None, split=split, streaming=streaming)
    except Exception as error:
        raise DataError(
            f"dataset {dataset!r}, split {split!r}, could not be opened: {cause(error)}. Check the name, the "
            f"configuration ({HUB_PREFIX}{repository}:NAME) and the split; a private data set needs `hf auth login`. "
            "On a machine without a network, copy the files there and use dataset = 'text' with dataset_path."
        ) from error
    columns = opened.column_names
    if columns is not None and text_field not in columns:
        raise DataError(missing_field(f"dataset {dataset!r}", text_field, columns))
    if isinstance(opened, datasets.IterableDataset):
        if columns is not None:
            opened = opened.select_columns([text_field])
        return _sharded(dataset, opened, lambda row: _hub_text(row, text_field, dataset, bad_text))
    if opened.data.num_rows != len(opened):  # rows chosen by an index: make the table hold just those
        opened = opened.flatten_indices()
    kind = opened.features[text_field]
    if kind not in (datasets.Value("string"), datasets.Value("large_string")):
        check_text(opened[0][text_field], f"dataset {dataset!r}, row 0", text_field, bad_text)
        raise DataError(f"dataset {dataset!r}: {text_field!r} holds {kind}, expected text")
    # Nobody can edit a hub data set for one null row: those are left out, as empty documents are.
    return DocumentCorpus(dataset, ArrowDocuments([opened.data.column(text_field)], bad_text, f"dataset {dataset!r}"))


def _open_registered(dataset: str, dataset_path: str | None, bad_text: BadText) -> Corpus:
    entry = _registry()[dataset]
    path = dataset_path or entry.path
    try:
        opened = entry.loader(path)
    except Exception as error:
        raise DataError(
            f"dataset {dataset!r} could not be opened from {path!r}: {cause(error)}. Without a network, point "
            "dataset_path at a local copy, or use dataset = 'text' or 'python_stdlib'."
        ) from error
    name = f"{dataset} ({path})"

    def text_of(row: dict[str, Any]) -> str:
        return bad_text.document(entry.sample_processor(row), f"dataset {name}")

    if isinstance(opened, datasets.IterableDataset):
        return _sharded(name, opened, text_of)
    return DocumentCorpus(name, ProcessedDocuments(opened, text_of, name))


def _sharded(name: str, dataset: datasets.IterableDataset, text_of: Callable[[dict], str]) -> ShardedCorpus:
    count = dataset.num_shards

    def read(shard: int, start: int) -> Iterator[str]:
        part = dataset.shard(num_shards=count, index=shard)
        try:
            yield from map(text_of, part.skip(start) if start else part)
        except UnicodeDecodeError as error:
            raise not_utf8(f"dataset {name}, shard {shard}", error) from error

    return ShardedCorpus(name, count, read)


def _hub_text(row: dict[str, Any], text_field: str, dataset: str, bad_text: BadText) -> str:
    if text_field not in row:
        raise DataError(missing_field(f"dataset {dataset!r}", text_field, row))
    return "" if row[text_field] is None else check_text(row[text_field], f"dataset {dataset!r}", text_field, bad_text)


def _registry() -> dict[str, Any]:
    """TorchTitan's text data sets; imported here because its next release moves them."""
    from torchtitan.hf_datasets.text_datasets import DATASETS

    return DATASETS
