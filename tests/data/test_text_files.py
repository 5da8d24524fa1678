"""nitp_titan.data.files"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nitp_titan.data.files import file_format, find_text_files, stdlib_files


@pytest.fixture
def folder(tmp_path):
    for name in [
        "b.txt",
        "a.jsonl",
        "sub/c.parquet",
        "sub/deep/d.txt.gz",
        "e.jsonl.zst",
        "odd [1].txt",
        ".hidden.txt",
        ".git/f.txt",
        "notes.md",
        "sub/x.csv",
        "p.parquet.gz",
        "README",
    ]:
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    return tmp_path / "corpus"


def names(files, folder):
    return [str(f.relative_to(folder)) for f in files]


def test_folder_is_searched_in_depth_sorted_and_warns_once(folder, caplog):
    with caplog.at_level(logging.WARNING):
        found = names(find_text_files(str(folder)), folder)
    assert found == ["a.jsonl", "b.txt", "e.jsonl.zst", "odd [1].txt", "sub/c.parquet", "sub/deep/d.txt.gz"]
    assert len(caplog.records) == 1
    assert "4 files skipped" in caplog.text
    assert ".md" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["b.txt", "odd [1].txt"]),
        ("**/*.txt*", ["b.txt", "odd [1].txt", "sub/deep/d.txt.gz"]),
        ("**/**/*.parquet", ["sub/c.parquet"]),
        ("odd [1].txt", ["odd [1].txt"]),
        ("[ab].*", ["a.jsonl", "b.txt"]),
        (".git", [".git/f.txt"]),
    ],
)
def test_globs_and_names(folder, pattern, expected):
    assert names(find_text_files(f"{folder}/{pattern}"), folder) == expected


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert names(find_text_files("~/corpus/b.txt"), folder) == ["b.txt"]


def test_links_to_folders_are_followed_but_not_in_circles(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "z.txt").write_text("z")
    (folder / "linked").symlink_to(other)
    (folder / "sub" / "circle").symlink_to(folder)
    found = names(find_text_files(str(folder)), folder)
    assert "linked/z.txt" in found
    assert len(found) == 7


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("", ["is empty"]),
        ("corpis/*.txt", ["'corpis/*.txt'", ".jsonl", "did you mean 'corpus'", "looked in"]),
        ("corpus/sub/deap", ["'deap'", "did you mean 'deep'"]),
        ("corpus/*.md", ["all 1 files there have other endings", "'notes.md'"]),
        ("corpus/notes.md", ["'corpus/notes.md'", "ending that is not read", ".parquet"]),
        ("corpus/p.parquet.gz", ["ending that is not read"]),
        ("empty", ["that folder has none"]),
        ("data.json", ["rename it to .jsonl"]),
    ],
)
def test_errors_say_what_and_where(folder, monkeypatch, path, parts):
    monkeypatch.chdir(folder.parent)
    Path("empty").mkdir()
    Path("data.json").write_text("{}")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        find_text_files(path)
    for part in parts:
        assert part in str(error.value)


def test_unreadable_file(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who can read all
    with pytest.raises(ValueError, match=r"b\.txt.*cannot be read"):
        find_text_files(str(folder / "b.txt"))


def test_file_format():
    cases = {"A.TXT": "text", "a.jsonl.zst": "json", "a.parquet": "parquet", "a.gz": None, "a": None}
    assert {name: file_format(name) for name in cases} == cases


def test_stdlib_files():
    files = stdlib_files()
    assert len(files) > 300
    assert all(f.suffix == ".py" for f in files)
    parts = {part for f in files for part in f.parts}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idle_test"}
    assert {"json", "asyncio"} <= parts
    assert files == stdlib_files()


def test_import_is_cheap():
    code = (
        "import sys, nitp_titan.data.files\n"
        "print([m for m in ('torch', 'datasets', 'torchtitan', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
