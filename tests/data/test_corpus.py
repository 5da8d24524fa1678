"""nitp_titan.data.corpus and nitp_titan.data.readers"""

import gzip
import json
import logging
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nitp_titan.data.corpus import DocumentCorpus, ShardedCorpus, dataset_names, open_corpus


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data.encode() if isinstance(data, str) else data
    if path.suffix == ".gz":
        data = gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])
    elif path.suffix == ".zst":
        # two frames, as parallel compressors write
        data = zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :])
    path.write_bytes(data)
    return path


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records)


def parquet(path, columns):
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def texts(corpus):
    if isinstance(corpus, DocumentCorpus):
        return [corpus.documents[i] for i in range(corpus.size)]
    return [text for i in range(corpus.size) for text in corpus.read(i, 0) if text]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "corpus"
    write(root / "a [1].txt", "one\nfile, one document é\n")
    write(root / "b.txt.gz", "zipped")
    write(root / "c.txt.zst", "z standard")
    write(root / "d.txt", "")
    write(root / "e.jsonl", lines({"text": "json 1", "x": 1}, {"text": ""}, {"text": "json 2", "x": 2}))
    write(root / "f.jsonl.gz", lines({"text": "json 3", "x": 3}))
    write(root / "g.jsonl.zst", lines({"text": "json 4", "x": 4}))
    parquet(root / "h.parquet", {"id": [1, 2, 3], "text": ["row 1", "row 2", "row 3"]})
    parquet(root / "i.parquet", {"text": ["row 4"], "other": ["x"]})
    return root


EXPECTED = ["one\nfile, one document é\n", "zipped", "z standard"]
EXPECTED += ["json 1", "json 2", "json 3", "json 4", "row 1", "row 2", "row 3", "row 4"]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_format(folder, streaming, caplog):
    with caplog.at_level(logging.INFO):
        corpus = open_corpus("text", str(folder), streaming=streaming)
    assert texts(corpus) == EXPECTED
    assert isinstance(corpus, ShardedCorpus if streaming else DocumentCorpus)
    assert "9 shards in 9 files" in caplog.text if streaming else "11 documents in 9 files" in caplog.text


@pytest.mark.parametrize("name", ["e.jsonl", "g.jsonl.zst", "h.parquet", "a [1].txt"])
def test_streaming_from_the_middle_of_a_shard(folder, name):
    corpus = open_corpus("text", str(folder / name), streaming=True)
    whole = list(corpus.read(0, 0))
    for start in range(len(whole) + 2):
        assert list(corpus.read(0, start)) == whole[start:]


@pytest.mark.parametrize("streaming", [False, True])
def test_jsonl_lines_need_not_agree_on_other_fields(tmp_path, streaming):
    write(
        tmp_path / "a.jsonl", lines({"body": "1", "meta": {"a": 1}}, {"body": "2", "meta": {"b": [1]}, "z": 1}) + "\n"
    )
    write(tmp_path / "b.jsonl", lines({"q": 1, "body": "3"}, {"body": "2020-01-01"}))
    corpus = open_corpus("text", str(tmp_path), text_field="body", streaming=streaming)
    assert texts(corpus) == ["1", "2", "3", "2020-01-01"]


def test_jsonl_of_dates_is_text(tmp_path):
    write(tmp_path / "a.jsonl", lines({"text": "2020-01-01"}, {"text": "2020-01-02"}))
    assert texts(open_corpus("text", str(tmp_path))) == ["2020-01-01", "2020-01-02"]


def test_an_edited_file_is_read_again(tmp_path):
    for word in ["first", "again!"]:
        write(tmp_path / "a.jsonl", lines({"text": word, "m": {"a": 1}}) + "\n" + lines({"text": "x", "q": 1}))
        assert texts(open_corpus("text", str(tmp_path))) == [word, "x"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            lines({"text": "x"}, {"txt": "y", "n": 1}),
            r"a\.jsonl, line 2: no field 'text'.*'txt'.*mean 'txt'",
        ),
        ("a.jsonl", lines({"text": "x"}, {"text": 3}), r"a\.jsonl, line 2: 'text' holds int \('3'\), expected text"),
        ("a.jsonl", lines({"text": "x"}, {"text": None}), r"a\.jsonl, line 2: 'text' holds null"),
        ("a.jsonl", lines({"text": {"a": 1}}), r"a\.jsonl, line 1: 'text' holds dict"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not a JSON object"),
        ("a.jsonl", '"just text"\n', r"a\.jsonl, line 1: expected a JSON object.*found str"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz cannot be read"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8: .* at byte 3"),
        ("a.txt.zst", b"not zstandard", r"a\.txt\.zst cannot be read"),
        ("a.parquet", b"not parquet", r"a\.parquet is not a readable parquet file"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, streaming, name, content, message):
    write(tmp_path / "0.txt", "good")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        texts(open_corpus("text", str(tmp_path), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"Text": ["x"]}, r"b\.parquet: no field 'text'.*'Text'.*mean 'Text'"),
        ({"text": [1]}, r"b\.parquet, row 0: 'text' holds int64"),
        ({"text": [b"x"]}, r"b\.parquet, row 0: 'text' holds binary"),
        ({"text": pa.array(["x", None]).dictionary_encode()}, r"b\.parquet, row 1: 'text' holds null"),
        ({"text": ["x", "y", None]}, r"b\.parquet, row 2: 'text' holds null"),
    ],
)
def test_bad_parquet(tmp_path, streaming, columns, message):
    parquet(tmp_path / "a.parquet", {"text": ["x"]})
    parquet(tmp_path / "b.parquet", columns)
    with pytest.raises(ValueError, match=message):
        texts(open_corpus("text", str(tmp_path), streaming=streaming))


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.jsonl", ""), ("a.jsonl", "\n\n")])
def test_nothing_but_empty(tmp_path, name, content):
    write(tmp_path / name, content)
    parquet(tmp_path / "b.parquet", {"text": pa.array([], type=pa.string())})
    with pytest.raises(ValueError, match="no document with text"):
        open_corpus("text", str(tmp_path))


def test_python_stdlib():
    corpus = open_corpus("python_stdlib")
    assert corpus.size > 300
    assert any("class JSONDecoder" in text for text in texts(corpus))


def test_names():
    assert dataset_names()[:2] == ["text", "python_stdlib"]
    with pytest.raises(ValueError, match=r"'c4_tst' \(did you mean 'c4_test'\?\).*python_stdlib.*hub:owner/name"):
        open_corpus("c4_tst")
    with pytest.raises(ValueError, match="needs dataset_path"):
        open_corpus("text")


def test_registered(tmp_path):
    write(tmp_path / "data.json", lines({"text": "a"}, {"text": "b"}))
    assert texts(open_corpus("c4_test", str(tmp_path))) == ["a", "b"]
    with pytest.raises(ValueError, match=r"'c4_test' could not be opened from 'nowhere'.*dataset_path"):
        open_corpus("c4_test", "nowhere")


ROWS = {"body": ["a", None, "", "b"], "n": [1, 2, 3, 4]}


@pytest.mark.parametrize("streaming", [False, True])
def test_hub(monkeypatch, streaming):
    calls = []

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        dataset = datasets.Dataset.from_dict(ROWS)
        return dataset.to_iterable_dataset(num_shards=2) if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = open_corpus("hub:me/mine:en", text_field="body", split="test", streaming=streaming)
    assert texts(corpus) == ["a", "b"]
    assert corpus.size == 2
    assert calls == [(("me/mine", "en"), {"split": "test", "streaming": streaming})]
    if streaming:
        assert list(corpus.read(1, 0)) == ["", "b"]
        assert list(corpus.read(1, 1)) == ["b"]
    with pytest.raises(ValueError, match=r"no field 'text' .*found 'body', 'n'"):
        open_corpus("hub:me/mine", streaming=streaming)
    with pytest.raises(ValueError, match=r"'n' holds int"):
        texts(open_corpus("hub:me/mine", text_field="n", streaming=streaming))


def test_hub_rows_chosen_by_index(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_dict(ROWS).select([3, 0]))
    assert texts(open_corpus("hub:me/mine", text_field="body")) == ["b", "a"]


def test_hub_errors():
    with pytest.raises(ValueError, match=r"'hub:me/mine'.*could not be opened.*Check the name.*dataset = 'text'"):
        open_corpus("hub:me/mine")
    with pytest.raises(ValueError, match="expected hub:owner/name"):
        open_corpus("hub:mine")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_forms_of_text_in_parquet(tmp_path, streaming, kind):
    rows = ["a", "b", "a", "", "é" * 5000, "a"]
    column = pa.array(rows)
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    parquet(tmp_path / "a.parquet", {"text": column, "n": range(6)})
    assert pq.read_schema(tmp_path / "a.parquet").field("text").type == kind
    assert texts(open_corpus("text", str(tmp_path), streaming=streaming)) == list(filter(None, rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_found_by_their_whole_name(tmp_path, streaming):
    nested = pa.array([{"b": "nested"}])
    pq.write_table(pa.table([nested, ["flat"]], names=["a", "a.b"]), tmp_path / "a.parquet")
    assert texts(open_corpus("text", str(tmp_path), text_field="a.b", streaming=streaming)) == ["flat"]
    twice = pa.table([pa.array(["x"]), pa.array(["y"]), pa.array([1])], names=["text", "text", "n"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: 2 columns are named 'text'.*expected one"):
        open_corpus("text", str(tmp_path), streaming=streaming)


NAMES = [
    "a::b",
    "zip::x.y",
    "s3:",
    "a b",
    "[1]*?",
    "100%",
    "ü",
    "#?&=",
    "'\"",
    "\\",
    "-rf",
    "~",
    "line\nbreak",
    "é" * 99,
]


@pytest.mark.parametrize("streaming", [False, True])
def test_odd_names_are_names(tmp_path, streaming):
    for number, name in enumerate(NAMES):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.txt").write_text(f"txt {number}")
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines({"text": f"json {number}"}).encode()))
        parquet(folder / f"{name}.parquet", {"text": [f"row {number}"]})
        expected = {f"{kind} {number}" for kind in ("txt", "json", "row")}
        assert set(texts(open_corpus("text", str(folder), streaming=streaming))) == expected
        one = str(folder / f"{name}.parquet")
        assert texts(open_corpus("text", one, streaming=streaming)) == [f"row {number}"]
    assert len(texts(open_corpus("text", str(tmp_path), streaming=streaming))) == 3 * len(NAMES)


@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_are_not_utf8(tmp_path, streaming):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xe9.jsonl", "wb") as file:
        file.write(b'{"text": "good"}\n{"text": "\xe9"}\n')
    found = texts(open_corpus("text", str(tmp_path), streaming=streaming, on_bad_text="skip"))
    assert found == ["good"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "record",
    ["[" * 100_000, '{"text": "x", "n": ' + "1" * 5000 + "}", '{"text": "x"', "NaN", '{"text": "x"} {"text": "y"}'],
    ids=["deep", "long number", "cut", "no object", "two on a line"],
)
def test_lines_that_are_no_records(tmp_path, streaming, record):
    write(tmp_path / "a.jsonl", lines({"text": "x"}) + record + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        texts(open_corpus("text", str(tmp_path), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_line_ends_and_unusual_lines(tmp_path, streaming):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    (tmp_path / "b.jsonl").write_bytes(b'\r\n{"text": "a\\u2028b\xe2\x80\xa8c"}\r\n \t\n{"text": "d", "text": "e"}')
    assert texts(open_corpus("text", str(tmp_path), streaming=streaming)) == [
        "one\ntwo\nthree\n",
        "a\u2028b\u2028c",
        "e",
    ]


def test_memory_and_streaming_hold_the_same_in_the_same_order(folder):
    in_memory, streamed = (texts(open_corpus("text", str(folder), streaming=how)) for how in (False, True))
    assert in_memory == streamed == EXPECTED


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.jsonl", ""), ("a.jsonl", '\n\n{"text": ""}\n')])
def test_streaming_nothing_but_empty(tmp_path, name, content):
    write(tmp_path / name, content)
    parquet(tmp_path / "b.parquet", {"text": pa.array([], type=pa.string())})
    with pytest.raises(ValueError, match="no document with text"):
        open_corpus("text", str(tmp_path), streaming=True)


def test_blank_lines_have_no_number(tmp_path):
    write(tmp_path / "a.jsonl", "\n" + lines({"text": "a"}) + "\n\n" + lines({"text": ""}, {"text": "b"}) + "\n")
    corpus = open_corpus("text", str(tmp_path), streaming=True)
    whole = list(corpus.read(0, 0))
    assert whole == ["a", "", "b"]
    for start in range(5):
        assert list(corpus.read(0, start)) == whole[start:]
