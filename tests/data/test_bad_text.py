"""dataloader.on_bad_text: one rule for every reader, in memory and streaming."""

import itertools
import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nitp_titan.data.bad_text import BOM, BadText
from nitp_titan.data.corpus import open_corpus
from nitp_titan.data.documents import MIN_PIECE_BYTES, ArrowDocuments, cut_long_documents
from nitp_titan.data.errors import DataError
from tests.data.test_corpus import texts
from tests.data.test_loader import equal, global_rows, make, same_state, take

LATIN = "café".encode("latin-1")
SURROGATE = b'{"text": "a\\ud800b"}\n'


def strings(values: list[bytes | None], kind=None) -> pa.Array:
    """A column of strings whose bytes nobody has looked at."""
    kind = kind or pa.string()
    plain = pa.array(values, type=pa.binary())
    if pa.types.is_string_view(kind):
        return strings(values).cast(kind)
    whole = plain.cast(pa.large_binary()) if pa.types.is_large_string(kind) else plain
    return pa.Array.from_buffers(kind, len(values), whole.buffers(), whole.null_count)


def write_parquet(path, values, kind=None):
    pq.write_table(pa.table({"text": strings(values, kind)}), path, row_group_size=2)


@pytest.fixture
def folder(tmp_path):
    """Good documents and bad ones of every format."""
    (tmp_path / "a.txt").write_text("good 0")
    (tmp_path / "b.txt").write_bytes(LATIN)
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "good 1"}\n\n{"text": "' + LATIN + b'"}\n' + SURROGATE)
    write_parquet(tmp_path / "d.parquet", [b"good 2", b"good 3", b"good 4", LATIN, b"good 5"])
    return tmp_path


GOOD = [f"good {i}" for i in range(6)]
PLACES = ["b.txt", "c.jsonl, line 3", "c.jsonl, line 4", "d.parquet, row 3"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", LATIN, r"a\.txt is not UTF-8: .* at byte 3"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt is not UTF-8: .* at byte 0 \(it begins as UTF-16 does\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "' + LATIN + b'"}', r"a\.jsonl, line 2 is not UTF-8: .* at byte 13"),
        ("a.jsonl", b'{"text": "x", "id": "' + LATIN + b'"}', r"a\.jsonl, line 1 is not UTF-8"),
        ("a.jsonl", SURROGATE, r"a\.jsonl, line 1 is not UTF-8: a lone surrogate at character 1"),
    ],
)
def test_an_error_names_file_and_row(tmp_path, streaming, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message + '.*on_bad_text = "replace" or "skip"'):
        texts(open_corpus("text", str(tmp_path), streaming=streaming))


KINDS = [pa.string(), pa.large_string(), pa.string_view()]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_of_every_string_column(tmp_path, streaming, kind):
    write_parquet(tmp_path / "a.parquet", ["é".encode(), b"b", b"b", LATIN, b"c"], kind)
    assert pq.read_schema(tmp_path / "a.parquet").field("text").type == kind

    def read(rule):
        return texts(open_corpus("text", str(tmp_path), streaming=streaming, on_bad_text=rule))

    with pytest.raises(DataError, match=r"a\.parquet, row 3 is not UTF-8"):
        read("error")
    assert read("replace") == ["é", "b", "b", "caf\ufffd", "c"]
    assert read("skip") == ["é", "b", "b", "c"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dictionary_column_is_refused_whatever_the_rule(tmp_path, streaming):
    """Arrow decodes its words itself."""
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), strings([b"a", LATIN]))
    pq.write_table(pa.table({"text": words}), tmp_path / "a.parquet")
    for rule in ("error", "replace", "skip"):
        with pytest.raises(DataError, match=r"a\.parquet cannot be read from row 0.*UTF8.*dictionary columns"):
            texts(open_corpus("text", str(tmp_path), streaming=streaming, on_bad_text=rule))


@pytest.mark.parametrize("streaming", [False, True])
def test_replaced_and_skipped_documents_are_counted_with_their_place(folder, streaming, caplog):
    for rule, expected in [
        ("replace", ["good 0", "caf\ufffd", "good 1", "caf\ufffd", "a\ufffdb", *GOOD[2:5], "caf\ufffd", "good 5"]),
        ("skip", GOOD),
    ]:
        # Also where the copy of the corpus is there already.
        for _ in range(2):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "nitp_titan.data"):
                found = texts(open_corpus("text", str(folder), streaming=streaming, on_bad_text=rule))
            assert found == expected
            for place in PLACES:
                assert place in caplog.text
            assert ("skipped" if rule == "skip" else "U+FFFD") in caplog.text
            assert "4 so far" in caplog.text if streaming else "4 documents are not UTF-8" in caplog.text


def test_many_places_make_few_lines(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(SURROGATE * 250)
    for streaming, lines in ((True, [1, 2, 3, 4, 5, 10, 100]), (False, [250])):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "nitp_titan.data"):
            corpus = open_corpus("text", str(tmp_path), streaming=streaming, on_bad_text="replace")
            caplog.clear() if streaming else None
            assert texts(corpus) == ["a\ufffdb"] * 250
        assert len(caplog.records) == len(lines)
        assert str(lines[-1]) in caplog.records[-1].getMessage()


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_left_is_told_at_once(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_bytes(SURROGATE * 3)
    with pytest.raises(DataError, match="no document with text"):
        open_corpus("text", str(tmp_path), streaming=streaming, on_bad_text="skip")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("rule", ["error", "replace"])
def test_a_byte_order_mark_is_no_text(tmp_path, streaming, rule):
    record = json.dumps({"text": BOM + "c"}, ensure_ascii=False)
    (tmp_path / "a.txt").write_text(BOM + "a" + BOM, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(BOM + '{"text": "b"}\n' + record + "\n" + BOM + '{"text": "d"}\n')
    pq.write_table(pa.table({"text": [BOM + "e", BOM]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text(BOM, encoding="utf-8")
    found = texts(open_corpus("text", str(tmp_path), streaming=streaming, on_bad_text=rule))
    assert found == ["a" + BOM, "b", "c", "d", "e"]


def bad_lines(path, bad: set[int], count: int = 40):
    """A .jsonl of `count` documents of many lengths, those of `bad` with a byte that is not UTF-8."""
    lines = [f'{{"text": "{k} {"abc " * (k * 7 % 23)}'.encode() + b"\xe9" * (k in bad) + b'"}\n' for k in range(count)]
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("rule", ["skip", "replace"])
def test_resumes_at_every_step_within_documents_and_between(tmp_path, streaming, rule):
    for name in range(8):
        bad_lines(tmp_path / f"{name}.jsonl", {0, 1, name, 17, 38, 39})
    options = {"streaming": streaming, "B": 3, "on_bad_text": rule}
    expected = take(make(tmp_path, **options), 45)
    loader = make(tmp_path, **options)
    iterator = iter(loader)
    for at in range(40):
        state = loader.state_dict()
        resumed = make(tmp_path, **options)
        resumed.load_state_dict(state)
        assert equal(take(resumed, 5), expected[at : at + 5])
        next(iterator)
    # Documents were left in their middle, where resuming is hard.
    assert any(int(cursor[2]) for cursor in state["streams"].values())


@pytest.mark.parametrize("streaming", [False, True])
def test_skipping_leaves_what_a_corpus_without_them_has(tmp_path, streaming):
    bad_lines(tmp_path / "bad.jsonl", {0, 5, 6, 39})
    kept = [line for line in (tmp_path / "bad.jsonl").read_bytes().splitlines(True) if b"\xe9" not in line]
    (tmp_path / "kept.jsonl").write_bytes(b"".join(kept))
    one_pass = {"infinite": False, "streaming": streaming}
    skipping = list(make(tmp_path / "bad.jsonl", on_bad_text="skip", **one_pass))
    assert equal(skipping, list(make(tmp_path / "kept.jsonl", **one_pass)))
    # And so does every number of ranks.
    reference = global_rows([take(make(tmp_path / "bad.jsonl", on_bad_text="skip", B=1, num_streams=1), 24)])
    assert torch.equal(reference, global_rows([take(make(tmp_path / "kept.jsonl", B=1, num_streams=1), 24)]))


def test_one_pass_resumes_too(tmp_path):
    bad_lines(tmp_path / "a.jsonl", {0, 5, 6, 39})
    options = {"infinite": False, "on_bad_text": "skip"}
    expected = list(make(tmp_path, **options))
    loader = make(tmp_path, **options)
    for at, _ in enumerate(itertools.islice(iter(loader), len(expected) - 1), 1):
        resumed = make(tmp_path, **options)
        resumed.load_state_dict(loader.state_dict())
        assert same_state(resumed.state_dict(), loader.state_dict())
        assert equal(list(resumed), expected[at:])


def test_an_unknown_rule_is_refused(folder):
    with pytest.raises(DataError, match=r"on_bad_text = 'ignore': expected one of error, replace, skip"):
        make(folder, on_bad_text="ignore")


def hub(values: list[bytes]) -> datasets.Dataset:
    table = pa.table({"text": strings(values)})
    return datasets.Dataset(datasets.table.InMemoryTable(table), split=datasets.Split.TRAIN)


def test_hub_data_in_memory(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: hub([b"a", LATIN, BOM.encode() + b"c"]))
    with pytest.raises(DataError, match=r"dataset 'hub:me/mine', row 1 is not UTF-8"):
        texts(open_corpus("hub:me/mine"))
    assert texts(open_corpus("hub:me/mine", on_bad_text="replace")) == ["a", "caf\ufffd", "c"]
    assert texts(open_corpus("hub:me/mine", on_bad_text="skip")) == ["a", "", "c"]


def test_hub_data_in_order_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: hub([b"a", LATIN]).to_iterable_dataset())
    for rule in ("error", "skip"):
        with pytest.raises(DataError, match=r"dataset hub:me/mine, shard 0: not UTF-8"):
            texts(open_corpus("hub:me/mine", streaming=True, on_bad_text=rule))


def test_pieces_of_long_documents():
    long = (b"word " * MIN_PIECE_BYTES)[: 4 * MIN_PIECE_BYTES - 1] + b"\xe9"
    column = pa.chunked_array([strings([b"short", BOM.encode() + long])])
    pieces = cut_long_documents(ArrowDocuments([column], BadText("replace", log=False), "hub"), num_streams=64)
    assert len(pieces) == 5
    assert "".join(pieces[i] for i in (1, 2, 3, 4)) == long[:-1].decode() + "\ufffd"
    with pytest.raises(DataError, match="hub, row 1 is not UTF-8"):
        cut_long_documents(ArrowDocuments([column], BadText(), "hub"), num_streams=64)[4]
