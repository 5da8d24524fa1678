"""nitp_titan.data.compressed: what breaks off is never read as something shorter."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nitp_titan.data.compressed import opened
from nitp_titan.data.corpus import open_corpus
from nitp_titan.data.errors import DataError
from tests.data.test_corpus import texts

SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00pzst"  # a frame without content, as parallel compressors write


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


COMPRESS = {".gz": gzip.compress, ".zst": zst}
LINES = [json.dumps({"text": f"{i} " + random.Random(i).randbytes(40).hex()}).encode() + b"\n" for i in range(3000)]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("frames", [1, 3])
def test_whole_files_are_read_whole(tmp_path, ending, frames):
    data = b"".join(LINES)
    parts = [data[k * len(data) // frames : (k + 1) * len(data) // frames] for k in range(frames)]
    content = b"".join(COMPRESS[ending](part) for part in [*parts, b""])
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(content + SKIPPABLE * (ending == ".zst"))
    with opened(path) as file:
        assert list(file) == LINES
    with opened(path) as file:  # in one piece, and in small ones
        assert file.read(10) + file.read() == data


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("frames", [1, 3])
def test_a_file_that_breaks_off_is_named_with_the_byte(tmp_path, streaming, ending, frames):
    whole = b"".join(COMPRESS[ending](b"".join(LINES[k::frames])) for k in range(frames))
    (tmp_path / "0.txt").write_text("good")
    path = tmp_path / f"a.jsonl{ending}"
    for kept in (len(whole) - 1, len(whole) - 12, len(whole) * 9 // 10, 3, 0):
        path.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=rf"a\.jsonl\{ending} breaks off at byte {kept}:"):
            texts(open_corpus("text", str(tmp_path), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("stem", ["a.jsonl", "a.txt"])
def test_damage_within_a_file_is_named(tmp_path, streaming, ending, stem):
    content = bytearray(COMPRESS[ending](b"".join(LINES)))
    content[len(content) // 2] ^= 0x55
    (tmp_path / (stem + ending)).write_bytes(content)
    # What gzip's checksum tells at the end, a broken line may tell before.
    garbled = r"|, line \d+(: not a JSON object| is not UTF-8)" if "jsonl" in stem else ""
    with pytest.raises(DataError, match=rf"{stem}\{ending}( cannot be read, at byte \d+ or before{garbled})"):
        texts(open_corpus("text", str(tmp_path), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_damage_within_a_parquet_file_is_named_with_the_row(tmp_path, streaming):
    rows = [f"{i} " + random.Random(i).randbytes(40).hex() for i in range(4096)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": rows}), path, row_group_size=1024, use_dictionary=False, compression="zstd")
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(2).column(0).data_page_offset
    content[start : start + 60] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read from row 2048 on"):
        texts(open_corpus("text", str(tmp_path), streaming=streaming))
