"""A file's bytes, decompressed. One that breaks off is an error, never a shorter file."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import zstandard

from nitp_titan.data.errors import DataError
from nitp_titan.data.files import COMPRESSED

_READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""What opening or decompressing a damaged file raises."""

_CHUNK = 1 << 17  # compressed bytes read at a time


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed if its name ends in .gz or .zst.

    Raises:
        DataError: from inside the block too, naming the file and the byte of it that was reached, for a file that
            cannot be opened, is damaged, or ends before its compressed data does.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    with file:
        try:
            yield _decompressed(path, file)
        except EOFError as error:
            raise DataError(f"{path} breaks off at byte {file.tell()}: {error}") from error
        except _READ_ERRORS as error:
            raise DataError(f"{path} cannot be read, at byte {file.tell()} or before: {error}") from error


def _decompressed(path: Path | str, file: IO[bytes]) -> IO[bytes]:
    name = str(path).lower()
    if not name.endswith(COMPRESSED):
        return file
    # Python's gzip takes a file of no bytes for one without content. Every compressor writes a header.
    if not file.read(1):
        raise EOFError("a compressed file has a header, and this one is empty")
    file.seek(0)
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    return io.BufferedReader(_ZstdFrames(file), _CHUNK)


class _ZstdFrames(io.RawIOBase):
    """The content of all frames of a file, one after the other: parallel compressors write several.

    `zstandard`'s own reader of several frames takes the end of the file for the end of a frame.

    Raises:
        EOFError: the file ends within a frame.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._frame = None  # the decompressor of the frame that is being read
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._content:
            self._compressed = self._compressed or self._file.read(_CHUNK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._content = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data  # empty unless the frame has come to its end
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._content))
        buffer[:count], self._content = self._content[:count], self._content[count:]
        return count
