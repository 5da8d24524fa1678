"""nitp_titan.data.documents"""

import numpy as np
import pyarrow as pa
import pytest

from nitp_titan.data.documents import MIN_PIECE_BYTES, ArrowDocuments, ListDocuments, cut_long_documents


def arrow(*columns):
    return ArrowDocuments([pa.chunked_array(chunks, type=pa.string()) for chunks in columns])


def test_arrow_columns_follow_each_other_without_empty_rows():
    documents = arrow([["a", "", "bé"], ["c"]], [[None, "d"]], [[]], [["e"]])
    assert [documents[i] for i in range(len(documents))] == ["a", "bé", "c", "d", "e"]
    assert documents.sizes().tolist() == [1, 3, 1, 1, 1]
    assert bytes(documents.raw(1)) == "bé".encode()


@pytest.mark.parametrize("make", [lambda texts: ListDocuments([t.encode() for t in texts]), lambda t: arrow([t])])
@pytest.mark.parametrize(
    "text", ["é" * 60_000, "word " * 24_000, "a line of text\n" * 8_000, "\N{PILE OF POO}" * 30_001]
)
def test_pieces_make_up_the_document(make, text):
    documents = make(["short one", text, "short two"])
    cut = cut_long_documents(documents, num_streams=4)
    texts = [cut[i] for i in range(len(cut))]
    assert texts[0] == "short one"
    assert texts[2] == "short two"
    assert texts[1] + "".join(texts[3:]) == text
    sizes = np.array([len(t.encode()) for t in [texts[1], *texts[3:]]])
    assert len(sizes) >= 16
    assert sizes.min() > MIN_PIECE_BYTES // 2
    if " " in text:
        assert all(t.endswith(("\n", " ")) for t in [texts[1], *texts[3:]])


def test_only_what_is_longer_than_a_share_is_cut():
    even = ListDocuments([b"x" * 10_000] * 100)
    assert cut_long_documents(even, num_streams=64) is even
    short = ListDocuments([b"x" * MIN_PIECE_BYTES])
    assert cut_long_documents(short, num_streams=64) is short
    assert len(cut_long_documents(ListDocuments([b"x" * 64 * 4 * MIN_PIECE_BYTES]), num_streams=64)) == 256
