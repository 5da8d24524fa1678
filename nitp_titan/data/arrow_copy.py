"""The copy of text files that is drawn from in memory: Arrow, in the cache of `datasets`, memory-mapped.

It holds what `read_documents` yields of each file, so that a corpus in memory and a streamed one are the same.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa

from nitp_titan.data.bad_text import BadText, OnBadText
from nitp_titan.data.errors import DataError
from nitp_titan.data.readers import first_line, read_documents

_TABLE_ROWS, _TABLE_BYTES = 1000, 1 << 24  # of a piece of the copy, whichever comes first
_SCHEMA = pa.schema([("text", pa.large_string()), ("bad", pa.string())])


@dataclass
class _Config(datasets.BuilderConfig):
    """What a copy depends on; `datasets` makes the folder's name of it."""

    files: list[str] = field(default_factory=list)
    stamps: list[tuple[int, int]] = field(default_factory=list)
    """Size and time of change of each file, so that an edited one is read again."""
    text_field: str = "text"
    on_bad_text: OnBadText = "error"


class TextCopy(datasets.ArrowBasedBuilder):
    """Columns `text`, and `bad`: file and row of a document that was not UTF-8, else null."""

    VERSION = datasets.Version("1.0.0")  # another one makes every copy again
    BUILDER_CONFIG_CLASS = _Config

    def _info(self):
        return datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(_SCHEMA))

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN)]

    def _generate_tables(self):
        for number, table in enumerate(_tables(self.config)):
            # An older `datasets` takes any key, the present one a pair.
            yield (0, number), table


def open_copy(files: list[Path], text_field: str, on_bad_text: OnBadText) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The documents of files, from a copy that is made where there is none yet.

    Returns:
        (rows,) large_string, empty documents included; and (rows,) string: where a document was not UTF-8, else null.

    Raises:
        DataError: a file that cannot be read or has what is not text, or a cache that cannot be written.
    """
    status = [path.stat() for path in files]
    builder = TextCopy(
        dataset_name="nitp_text",
        files=[str(path.absolute()) for path in files],
        stamps=[(s.st_size, s.st_mtime_ns) for s in status],
        text_field=text_field,
        on_bad_text=on_bad_text,
    )
    try:
        builder.download_and_prepare(verification_mode="no_checks")
        table = builder.as_dataset(split=datasets.Split.TRAIN, verification_mode="no_checks").data
    except Exception as error:
        raise DataError(cause(error)) from error
    return table.column("text"), table.column("bad")


def _tables(config: _Config) -> Iterator[pa.Table]:
    texts, places, size = [], [], 0
    bad_text = BadText(config.on_bad_text, log=False)  # every run that opens the copy tells of them
    for path in config.files:
        for text in read_documents(path, config.text_field, 0, bad_text):
            texts.append(text)
            places.append(_printable(bad_text.place) if bad_text.place else None)
            bad_text.place = ""
            size += len(text)
            if len(texts) >= _TABLE_ROWS or size >= _TABLE_BYTES:
                yield pa.table([texts, places], schema=_SCHEMA)
                texts, places, size = [], [], 0
    # `datasets` cannot hold a table without rows; empty documents are left out later.
    yield pa.table([[*texts, ""], [*places, None]], schema=_SCHEMA)


def _printable(name: str) -> str:
    """A file's name as Arrow can hold it: names need not be UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def cause(error: BaseException) -> str:
    """The first line of what went wrong at the bottom: `datasets` wraps it in one that says nothing."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DataError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}".rstrip(".")
