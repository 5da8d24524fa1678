"""Documents of one local file, read in order: what streams draw, and what the copy in memory is made of."""

import contextlib
import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitp_titan.data.bad_text import BOM, BadText, OnBadText
from nitp_titan.data.compressed import opened
from nitp_titan.data.errors import DataError
from nitp_titan.data.files import file_format, nearest_name

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_PARQUET_ROWS = 1024  # decoded at a time
_FIRST_ROWS, _FIRST_BYTES = 8, 1 << 16  # that a look at a file reads


def read_documents(path: Path | str, text_field: str, start: int = 0, bad_text: BadText | None = None) -> Iterator[str]:
    """Documents of a local file from number `start` on; empty ones are yielded, so that numbers stay put.

    Args:
        path: a file of a format of `files.FORMATS`. A .txt file is one document, a .jsonl line and a .parquet row too.
        text_field: key or column of the text; a .txt file has none.
        start: number of the first document to yield.
        bad_text: what becomes of text that is not UTF-8; None refuses it.

    Raises:
        DataError: naming the file, and the line or row, of anything that is not text; the file and the byte, where
            compressed data break off.
    """
    bad_text = bad_text or BadText()
    kind = file_format(path)
    if kind == "text":
        if start == 0:
            with opened(path) as file:
                yield _universal_newlines(bad_text.document(file.read(), str(path)))
    elif kind == "json":
        yield from _read_jsonl(path, text_field, start, bad_text)
    elif kind == "parquet":
        yield from _read_parquet(path, text_field, start, bad_text)
    else:
        raise AssertionError(f"not a text file: {path}")


def first_problem(path: Path | str, text_field: str, on_bad_text: OnBadText = "error") -> tuple[str | None, bool]:
    """Look at the first rows of a file, at little cost however large it is.

    Returns:
        What is wrong with them, if anything; and whether the file has been read to its end without meeting a text.
    """
    bad_text = BadText(on_bad_text, log=False)
    try:
        if file_format(path) == "text":
            with opened(path) as file:
                found = file.read(_FIRST_BYTES)
            # The last character may be cut in two.
            found = found.removesuffix(_cut_character(found)) if len(found) == _FIRST_BYTES else found
            return None, not bad_text.document(found, str(path))
        texts = list(islice(read_documents(path, text_field, 0, bad_text), _FIRST_ROWS))
        return None, len(texts) < _FIRST_ROWS and not any(texts)
    except DataError as error:
        return str(error), False


def _read_jsonl(path: Path | str, text_field: str, start: int, bad_text: BadText) -> Iterator[str]:
    """Text of each line of a .jsonl file; blank lines are no documents."""
    with opened(path) as lines:
        document = -1
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            document += 1
            if document < start:
                continue
            where = f"{path}, line {number}"
            text = bad_text.decode(line, where)
            if text is None:
                yield ""
                continue
            try:
                record = json.loads(text.removeprefix(BOM))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not a JSON object: {error}") from None
            yield _field(record, text_field, where, bad_text)


def _read_parquet(path: Path | str, text_field: str, start: int, bad_text: BadText) -> Iterator[str]:
    import pyarrow as pa

    row = 0
    with _opened_parquet(path) as file:
        if problem := _schema_problem(file.schema_arrow, path, text_field):
            raise DataError(problem)
        batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field])
        while True:
            try:
                if (batch := next(batches, None)) is None:
                    return
                # By name: "a.b" also selects what is nested so. As bytes: nobody has looked whether they are UTF-8.
                column = batch.column(batch.schema.get_field_index(text_field)).cast(pa.large_binary())
                first = max(start - row, 0)
                values = column[first:].to_pylist()
            except (pa.ArrowException, OSError) as error:
                # Arrow decodes the words of a dictionary column itself.
                hint = "; dataloader.on_bad_text does not reach dictionary columns" if "UTF8" in str(error) else ""
                raise DataError(f"{path} cannot be read from row {row} on: {first_line(error)}{hint}") from error
            for number, value in enumerate(values, row + first):
                where = f"{path}, row {number}"
                yield (
                    check_text(None, where, text_field, bad_text) if value is None else bad_text.document(value, where)
                )
            row += len(batch)


def check_text(value: Any, where: str, text_field: str, bad_text: BadText) -> str:
    """The text of a document's field.

    Raises:
        DataError: starting with `where`, for a value that is not a string, or text that `bad_text` refuses.
    """
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: {text_field!r} holds {found} ({str(value)[:40]!r}), expected text")
    return bad_text.document(value, where)


def parquet_problem(path: Path | str, text_field: str) -> str | None:
    """What is wrong with the text column of a .parquet file, by its schema alone; None if nothing is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as handle:
            schema = pq.read_schema(handle)
    except (pa.ArrowException, OSError) as error:
        return _unreadable_parquet(path, error)
    return _schema_problem(schema, path, text_field)


@contextlib.contextmanager
def _opened_parquet(path: Path | str) -> "Iterator[pq.ParquetFile]":
    import pyarrow as pa
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as stack:
        try:
            # By handle: pyarrow looks for a file system in some names.
            file = stack.enter_context(pq.ParquetFile(stack.enter_context(open(path, "rb"))))
        except (pa.ArrowException, OSError) as error:
            raise DataError(_unreadable_parquet(path, error)) from error
        yield file


def _unreadable_parquet(path: Path | str, error: Exception) -> str:
    return f"{path} is not a readable parquet file: {first_line(error)}"


def _schema_problem(schema: "pa.Schema", path: Path | str, text_field: str) -> str | None:
    import pyarrow as pa

    if text_field not in schema.names:
        return missing_field(str(path), text_field, schema.names)
    if (columns := schema.names.count(text_field)) > 1:
        return f"{path}: {columns} columns are named {text_field!r} (text_field), expected one"
    kind = schema.field(text_field).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)):
        return f"{path}, row 0: {text_field!r} holds {kind}, expected text"
    return None


def missing_field(where: str, text_field: str, found) -> str:
    """Message for a record or table without the text field."""
    names = ", ".join(repr(str(n)) for n in list(found)[:20])
    return f"{where}: no field {text_field!r} (text_field); found {names or 'none'}{nearest_name(text_field, found)}"


def _field(record: Any, text_field: str, where: str, bad_text: BadText) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object with a field {text_field!r}, found {type(record).__name__}")
    if text_field not in record:
        raise DataError(missing_field(where, text_field, record))
    return check_text(record[text_field], where, text_field, bad_text)


def _universal_newlines(text: str) -> str:
    """The text with every line end as one character."""
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)


def _cut_character(found: bytes) -> bytes:
    """The first bytes of a UTF-8 character at the end of `found` that has more; empty where none is cut."""
    for length in (1, 2, 3):
        tail = found[-length:]
        needed = 2 + (tail[0] >= 0xE0) + (tail[0] >= 0xF0)
        if tail[0] >= 0xC0:
            return tail if needed > length else b""
    return b""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type's name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
