"""Documents of one local file, read in order: the streaming path, and the reader that knows line numbers."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import zstandard

from nitp_titan.data.errors import DataError
from nitp_titan.data.files import file_format, nearest_name

_READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""What opening or decompressing a damaged file raises."""


def open_bytes(path: Path | str) -> IO[bytes]:
    """The file's bytes, decompressed if its name ends in .gz or .zst."""
    name = str(path).lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")
    if name.endswith(".zst"):
        # Parallel compressors write several frames; without the flag only the first would be read, silently.
        file = open(path, "rb")  # noqa: SIM115 (closed with the reader)
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    return open(path, "rb")


def read_documents(path: Path | str, text_field: str, start: int = 0) -> Iterator[str]:
    """Documents of a local file from number `start` on; empty ones are yielded, so that numbers stay put.

    Args:
        path: a file of a format of `files.FORMATS`. A .txt file is one document, a .jsonl line and a .parquet row too.
        text_field: key or column of the text; a .txt file has none.
        start: number of the first document to yield.

    Raises:
        DataError: naming the file, and the line or row, of anything that is not text.
    """
    kind = file_format(path)
    if kind == "text":
        yield from ([_read_txt(path)] if start == 0 else [])
    elif kind == "json":
        yield from islice(read_jsonl(path, text_field), start, None)
    elif kind == "parquet":
        yield from _read_parquet(path, text_field, start)
    else:
        raise AssertionError(f"not a text file: {path}")


def read_jsonl(path: Path | str, text_field: str) -> Iterator[str]:
    """Text of each line of a .jsonl file; blank lines are no documents.

    Raises:
        DataError: naming the file and the line, for a line that is not a JSON object with a string in `text_field`.
    """
    try:
        with open_bytes(path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                    raise DataError(f"{path}, line {number}: not a JSON object: {error}") from None
                yield _field(record, text_field, f"{path}, line {number}")
    except _READ_ERRORS as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def check_text(value: Any, where: str, text_field: str) -> str:
    """`value` if it is a string that UTF-8 can hold (a lone surrogate becomes "?").

    Raises:
        DataError: starting with `where`, for a value that is not a string.
    """
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: {text_field!r} holds {found} ({str(value)[:40]!r}), expected text")
    if not value.isascii():
        value = value.encode("utf-8", errors="replace").decode("utf-8")
    return value


def parquet_problem(path: Path | str, text_field: str) -> str | None:
    """What is wrong with the text column of a .parquet file, by its schema alone; None if nothing is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        return f"{path} is not a readable parquet file: {first_line(error)}"
    if text_field not in schema.names:
        return missing_field(str(path), text_field, schema.names)
    kind = schema.field(text_field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return f"{path}, row 0: {text_field!r} holds {kind}, expected text"
    return None


def missing_field(where: str, text_field: str, found) -> str:
    """Message for a record or table without the text field."""
    names = ", ".join(repr(str(n)) for n in list(found)[:20])
    return f"{where}: no field {text_field!r} (text_field); found {names or 'none'}{nearest_name(text_field, found)}"


def _field(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object with a field {text_field!r}, found {type(record).__name__}")
    if text_field not in record:
        raise DataError(missing_field(where, text_field, record))
    return check_text(record[text_field], where, text_field)


def _read_txt(path: Path | str) -> str:
    try:
        with open_bytes(path) as file:
            # Universal newlines, as `datasets` reads text.
            return io.TextIOWrapper(file, encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except _READ_ERRORS as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_parquet(path: Path | str, text_field: str, start: int) -> Iterator[str]:
    import pyarrow.parquet as pq

    problem = parquet_problem(path, text_field)
    if problem:
        raise DataError(problem)
    row = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
            first = max(start - row, 0)
            for offset, value in enumerate(batch.column(0)[first:].to_pylist(), row + first):
                yield check_text(value, f"{path}, row {offset}", text_field)
            row += len(batch)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type's name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
