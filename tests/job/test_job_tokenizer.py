"""nitp_titan.job.checks.tokenizer: what a check says of a tokenizer, and what it refuses."""

from __future__ import annotations

import json
import time

import pytest

from nitp_titan.job import load_job
from nitp_titan.job.checks.tokenizer import tokenizer_notes
from nitp_titan.tools.explain import explain
from tests.data.test_hf_tokenizer import BOS, CONFIG, EOS, bpe, write
from tests.job.test_job_check import problems


def arguments(folder, *words: str) -> list[str]:
    return ["--tokenizer.name=huggingface", f"--model.hf_assets_path={folder}", *words]


@pytest.fixture
def plain(tmp_path):
    """Without a configuration: no token ends a document."""
    return write(tmp_path / "plain")


def test_no_end_token_is_told_with_the_remedy(plain):
    printed = explain(load_job(None, arguments(plain), 1))
    [line] = [line for line in printed.splitlines() if "EOS" in line]
    assert line.startswith("note ")
    assert f'set tokenizer.eos_token to a token of the vocabulary, such as "{BOS}", "{EOS}"' in line
    job = load_job(None, arguments(plain, f"--tokenizer.eos_token={EOS}"), 1)
    assert f'documents end with "{EOS}" (258, tokenizer.eos_token)' in explain(job)


def test_what_is_not_obeyed_is_told(tmp_path):
    tokenizer = bpe()
    tokenizer.enable_truncation(32)
    printed = explain(load_job(None, arguments(write(tmp_path / "a", tokenizer, tokenizer_config=CONFIG)), 1))
    assert "truncation to 32 tokens of tokenizer.json is not obeyed: documents are read whole" in printed


def test_check_and_run_say_the_same(plain, caplog):
    from nitp_titan.job.build import tokenizer_config

    job = load_job(None, arguments(plain, f"--tokenizer.eos_token={EOS}", "--tokenizer.no-add_eos"), 1)
    with caplog.at_level("INFO", "nitp_titan.data"):
        tokenizer_config(job).build(tokenizer_path=str(plain))
    said = [record.getMessage() for record in caplog.records]
    assert said == tokenizer_notes(str(plain), dict(job["tokenizer"])) != []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tokenizer.eos_token=<|edn|>"], ['--tokenizer.eos_token: found "<|edn|>", which is no token of ']),
        (
            ["--tokenizer.eos_token=<no>", "--tokenizer.bos_token=<nor>", "--tokenizer.add_eos"],
            ["--tokenizer.bos_token: found", "--tokenizer.eos_token: found"],
        ),
        (["--tokenizer.add_eos"], ["--tokenizer.add_eos: found true, and the tokenizer names no such token; set "]),
        (["--tokenizer.add_bos"], ["--tokenizer.add_bos: found true, and the tokenizer names no such token; set "]),
    ],
)
def test_refused(tmp_path, plain, words, expected):
    found = problems(tmp_path, *arguments(plain, *words))
    assert len(found) == len(expected), found
    for part in expected:
        assert any(part in problem for problem in found), found


def test_the_nearest_token_is_named(tmp_path, plain):
    [problem] = problems(tmp_path, *arguments(plain, "--tokenizer.eos_token=<|edn|>"))
    assert "plain/tokenizer.json'" in problem
    assert f"did you mean '{EOS}'?" in problem


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tokenizer.eos_token=x"], '--tokenizer.eos_token: found "x", expected "none" with name = "byte"'),
        (["--tokenizer.bos_token=x"], '--tokenizer.bos_token: found "x", expected "none" with name = "byte"'),
        (["--tokenizer.allow_special_in_text"], "--tokenizer.allow_special_in_text: found true, expected false with"),
    ],
)
def test_the_byte_tokenizer_has_its_own_tokens(tmp_path, words, expected):
    [problem] = problems(tmp_path, *words)
    assert expected in problem
    assert problems(tmp_path, "--tokenizer.no-add_eos", "--tokenizer.add_bos") == []


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.json", "{", "tokenizer.json' is not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json' is not JSON"),
        ("tokenizer_config.json", '{"eos_token": 3}', "tokenizer_config.json': eos_token is 3, expected a string"),
        ("special_tokens_map.json", '{"eos_token": "<no>"}', 'eos_token: found "<no>", which is no token of'),
    ],
)
def test_a_broken_file_is_named_by_the_check(tmp_path, plain, name, content, expected):
    (plain / name).write_text(content)
    [problem] = problems(tmp_path, *arguments(plain))
    assert problem.startswith("command line: --model.hf_assets_path: ")
    assert expected in problem


def test_a_token_that_a_configuration_adds_needs_an_embedding(tmp_path, plain):
    words = arguments(plain, "--model.shape.vocab_size=259")
    assert problems(tmp_path, *words) == []
    (plain / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"pad_token": "<|pad|>"}))
    [problem] = problems(tmp_path, *words)
    assert "has ids up to 259, expected less than the model's vocabulary of 259" in problem


def test_a_large_vocabulary_is_read_once(plain, monkeypatch):
    from nitp_titan.data import tokenizer_folder

    calls, read = [], tokenizer_folder.read_folder
    monkeypatch.setattr(tokenizer_folder, "read_folder", lambda *a, **k: calls.append(a) or read(*a, **k))
    explain(load_job(None, arguments(plain), 1))
    assert len(calls) == 1
    time.sleep(0.01)
    write(plain, tokenizer_config=CONFIG)  # a changed folder is read again
    assert f'documents begin with "{BOS}"' in explain(load_job(None, arguments(plain), 1))
