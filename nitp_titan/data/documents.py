"""Map-style documents: random access by number, as UTF-8 text in memory or in memory-mapped Arrow.

A document that is more than one stream's fair share of a corpus is cut into pieces, each a document of its own.
Without that, a corpus of one big file would give every virtual stream the same tokens (each starts at a document's
first token), and streams that hold short documents would repeat them many times while another still reads the long
one.
"""

from itertools import pairwise
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nitp_titan.data.bad_text import BOM, BadText
from nitp_titan.data.errors import DataError

MIN_PIECE_BYTES = 4096
"""Documents up to this length are never cut: a piece should still be many tokens long."""

_PIECES_PER_SHARE = 4  # so that the streams of a corpus that was one file advance through well mixed pieces
_CUT_WINDOW = 1024  # bytes searched for a line end, then for a space, before a word is cut
_BOM = BOM.encode()


class Documents(Protocol):
    """What `streams` draws from: texts by number, 0 <= i < len."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> str: ...


class ListDocuments:
    """Documents held in memory as UTF-8."""

    def __init__(self, texts: list[bytes]):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, i: int) -> str:
        return self.decode(i, self._texts[i])

    def sizes(self) -> np.ndarray:
        """Bytes of each document, (len,) int64."""
        return np.fromiter(map(len, self._texts), dtype=np.int64, count=len(self._texts))

    def raw(self, i: int) -> memoryview:
        """The document's bytes, not copied."""
        return memoryview(self._texts[i])

    def decode(self, i: int, part: bytes) -> str:
        """The text of a part of document i."""
        return part.decode()


class ArrowDocuments:
    """Documents of one or more Arrow string columns, one after the other; empty and null rows are left out.

    Args:
        columns: string or large_string columns, usually memory-mapped, so that only what is read is in memory.
        bad_text: what becomes of a document, or a piece of a long one, that is not UTF-8, when it is drawn; a
            byte-order mark at a document's start is left out then, too. None where the columns hold neither.
        name: what the columns are, for messages.

    Raises:
        DataError: where a document is drawn that `bad_text` refuses.
    """

    def __init__(self, columns: list[pa.ChunkedArray], bad_text: BadText | None = None, name: str = ""):
        self._bad_text, self._name = bad_text, name
        self._columns = columns
        self._first_row = np.cumsum([0] + [len(c) for c in columns])
        lengths = [pc.fill_null(pc.binary_length(c), 0).to_numpy() for c in columns]
        self._lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
        # Row numbers are stored only where some are left out: 8 bytes a document count in a corpus of 10^9.
        self._rows = None if self._lengths.all() else np.flatnonzero(self._lengths)

    def __len__(self) -> int:
        return len(self._lengths) if self._rows is None else len(self._rows)

    def __getitem__(self, i: int) -> str:
        return self.decode(i, bytes(self.raw(i)))

    def sizes(self) -> np.ndarray:
        """Bytes of each document, (len,) int."""
        return self._lengths if self._rows is None else self._lengths[self._rows]

    def raw(self, i: int) -> memoryview:
        """The document's bytes, not copied."""
        found = memoryview(self._scalar(i).as_buffer())
        return found[len(_BOM) :] if self._bad_text and bytes(found[: len(_BOM)]) == _BOM else found

    def decode(self, i: int, part: bytes) -> str:
        """The text of a part of document i; "" where that is skipped."""
        if self._bad_text is None:
            return part.decode()
        return self._bad_text.decode(part, f"{self._name}, row {self._row(i)}") or ""

    def _row(self, i: int) -> int:
        return int(i) if self._rows is None else int(self._rows[i])

    def _scalar(self, i: int) -> pa.Scalar:
        row = self._row(i)
        column = int(np.searchsorted(self._first_row, row, side="right")) - 1
        return self._columns[column][row - int(self._first_row[column])]


class ProcessedDocuments:
    """Rows of a `datasets.Dataset`, made text by a function of the row; their lengths are not known beforehand."""

    def __init__(self, dataset, processor, name: str = ""):
        self._dataset = dataset
        self._processor = processor
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> str:
        try:
            return self._processor(self._dataset[int(i)])
        except UnicodeDecodeError as error:
            raise not_utf8(f"dataset {self._name}, row {i}", error) from error


def not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    """What to raise where `datasets` has decoded text before `BadText` could."""
    return DataError(
        f"{where}: not UTF-8: {error.reason} at byte {error.start}; dataloader.on_bad_text reaches the files of "
        'dataset = "text" and what a hub data set has on disk, not this'
    )


class CutDocuments:
    """Documents of which the long ones are cut into pieces.

    Document i keeps its number for its first piece; the other pieces are numbered from `len(documents)` on.
    """

    def __init__(self, documents: ListDocuments | ArrowDocuments, long: list[int], piece_bytes: int):
        self._documents = documents
        self._first_stop: dict[int, int] = {}
        self._others: list[tuple[int, int, int]] = []  # (document, start, stop)
        for i in long:
            stops = [*_cuts(documents.raw(i), piece_bytes)]
            self._first_stop[i] = stops[0]
            self._others += [(i, start, stop) for start, stop in pairwise(stops)]

    def __len__(self) -> int:
        return len(self._documents) + len(self._others)

    def __getitem__(self, i: int) -> str:
        if i >= len(self._documents):
            document, start, stop = self._others[i - len(self._documents)]
        elif i in self._first_stop:
            document, start, stop = i, 0, self._first_stop[i]
        else:
            return self._documents[i]
        return self._documents.decode(document, bytes(self._documents.raw(document)[start:stop]))


def cut_long_documents(documents: Documents, num_streams: int) -> Documents:
    """`documents`, with those longer than 1/num_streams of the whole corpus cut into pieces of a quarter of that.

    Cuts are made after a line end where there is one near, else after a space, else between two characters. Nothing
    of at most `MIN_PIECE_BYTES` is cut. Documents whose lengths are not known are returned as they are.
    """
    if not isinstance(documents, ListDocuments | ArrowDocuments):
        return documents
    sizes = documents.sizes()
    share = int(sizes.sum(dtype=np.int64)) // num_streams
    long = np.flatnonzero(sizes > max(share, MIN_PIECE_BYTES))
    if not len(long):
        return documents
    return CutDocuments(documents, [int(i) for i in long], max(share // _PIECES_PER_SHARE, MIN_PIECE_BYTES))


def _cuts(raw: memoryview, piece_bytes: int) -> list[int]:
    """Ends of the pieces of a document, in bytes, the last one being its length."""
    count = -(-len(raw) // piece_bytes)
    stops = []
    for k in range(1, count):
        at = k * len(raw) // count
        window = bytes(raw[at : at + _CUT_WINDOW])
        after = window.find(b"\n") + 1 or window.find(b" ") + 1
        if not after:
            # 0b10xxxxxx continues a character; a character has at most three such bytes.
            after = next((n for n, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
        stops.append(at + after)
    return sorted({*(s for s in stops if s < len(raw)), len(raw)})
