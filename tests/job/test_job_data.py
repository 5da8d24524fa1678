"""nitp_titan.job.checks.data: a check looks at the first rows of the data."""

from __future__ import annotations

import gzip
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_hf_tokenizer import CONFIG, write
from tests.job.test_job_check import problems

GOOD = b'{"text": "x"}\n' * 20


def words(path, *more: str, table: str = "dataloader") -> list[str]:
    return [f"--{table}.dataset=text", f"--{table}.dataset_path={path}", *more]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            b'{"txt": "x"}\n',
            "a.jsonl, line 1: no field 'text' (text_field); found 'txt' (did you mean 'txt'",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "a.jsonl, line 2: 'text' holds int ('3'), expected text"),
        ("a.jsonl", b'{"text": "x"\n', "a.jsonl, line 1: not a JSON object"),
        ("a.jsonl", b'{"text": "\xe9"}\n', "a.jsonl, line 1 is not UTF-8"),
        ("a.jsonl.gz", b'{"text": "x"}\n', "a.jsonl.gz cannot be read, at byte"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)[:7], "a.jsonl.gz breaks off at byte 7"),
        ("a.txt.zst", b"", "a.txt.zst breaks off at byte 0"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8"),
        ("a.txt", b"", "which has no document with text in it"),
        ("a.jsonl", b'\n{"text": ""}\n', "which has no document with text in it"),
        ("a.parquet", b"PAR1", "a.parquet is not a readable parquet file"),
    ],
)
@pytest.mark.parametrize("table", ["dataloader", "validator.dataloader"])
def test_first_rows_that_are_no_text(tmp_path, name, content, expected, table):
    (tmp_path / name).write_bytes(content)
    [problem] = problems(tmp_path, *words(tmp_path / name, table=table))
    assert problem.startswith(f"command line: --{table}.dataset_path: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"Text": ["x"]}, "a.parquet: no field 'text' (text_field); found 'Text' (did you mean 'Text'?)"),
        ({"text": [1]}, "a.parquet, row 0: 'text' holds int64, expected text"),
        ({"text": ["x", None]}, "a.parquet, row 1: 'text' holds null"),
    ],
)
def test_first_rows_of_parquet(tmp_path, columns, expected):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    [problem] = problems(tmp_path, *words(tmp_path))
    assert expected in problem


def test_a_field_that_was_set_is_the_place(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    text = f'[dataloader]\ndataset = "text"\ndataset_path = "{tmp_path}"\ntext_field = "body"\n'
    [problem] = problems(tmp_path, text=text)
    assert problem.startswith("job.toml:6: [dataloader] text_field: ")
    assert "no field 'body' (text_field); found 'text'" in problem


@pytest.mark.parametrize("rule", ["replace", "skip"])
def test_bad_text_that_is_allowed(tmp_path, rule):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xe9"}\n' + GOOD)
    assert problems(tmp_path, *words(tmp_path, f"--dataloader.on_bad_text={rule}")) == []
    [problem] = problems(tmp_path, *words(tmp_path, "--dataloader.on_bad_text=skpi"))
    assert '--dataloader.on_bad_text: found "skpi", expected one of "error", "replace", "skip"' in problem
    assert 'did you mean "skip"?' in problem


def test_validation_takes_the_rule_of_the_training_data_unless_it_has_its_own(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    training = words(tmp_path, "--dataloader.on_bad_text=replace", "--validator.enable")
    assert problems(tmp_path, *training) == []
    [problem] = problems(tmp_path, *training, "--validator.dataloader.on_bad_text=error")
    assert "a.txt is not UTF-8" in problem


def test_large_characters_are_not_taken_for_bad_where_the_look_ends(tmp_path):
    for shift in range(4):
        (tmp_path / "a.txt").write_text("x" * shift + "\N{PILE OF POO}" * 20_000 + "é")
        assert problems(tmp_path, *words(tmp_path)) == []


def test_a_look_takes_no_longer_for_much_data(tmp_path):
    for number in range(2000):
        (tmp_path / f"{number:04}.jsonl").write_bytes(GOOD)
    (tmp_path / "large.txt").write_bytes(b"text " * 20_000_000)
    begin = time.perf_counter()
    assert problems(tmp_path, *words(tmp_path)) == []
    assert time.perf_counter() - begin < 1.0


def test_a_look_imports_neither_torch_nor_datasets(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD, mtime=0))
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    folder = write(tmp_path / "tokenizer", tokenizer_config=CONFIG)
    options = [*words(tmp_path, "--tokenizer.name=huggingface"), f"--model.hf_assets_path={folder}"]
    code = (
        "import sys\nfrom nitp_titan.job import load_job\nfrom nitp_titan.tools.explain import explain\n"
        f"print(explain(load_job(None, {options}, 1)))\n"
        "print([name for name in ('torch', 'datasets', 'torchtitan') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "documents begin with" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
