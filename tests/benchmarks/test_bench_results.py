"""Where results lie."""

from __future__ import annotations

import json
import subprocess

import pytest

from benchmarks import results


def test_paths_name_device_program_and_job():
    def path(*words: str) -> str:
        return str(results.default_path(*words).relative_to(results.RESULTS))

    assert (
        path("throughput", "nitp_0.5b", "NVIDIA H100 80GB HBM3", "cuda") == "h100-80gb-hbm3/throughput-nitp-0.5b.json"
    )
    assert path("loss", "", "AMD EPYC", "cpu") == "cpu/loss.json"


def test_a_result_is_written_whole(tmp_path):
    path = tmp_path / "new" / "x.json"
    for value in (1, 2):
        results.write(path, {"a": value})
        assert json.loads(path.read_text()) == {"a": value}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_place_for_a_result_is_tried_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    results.check_writable(tmp_path / "new" / "x.json")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(ValueError, match=r"--out: .*file/x\.json cannot be written: "):
        results.check_writable(tmp_path / "file" / "x.json")
    with pytest.raises(ValueError, match="is a folder, expected a JSON file"):
        results.check_writable(tmp_path / "new")


def test_commit(monkeypatch, tmp_path):
    def git(*words: str) -> str:
        config = ["-c", "user.name=x", "-c", "user.email=x@x"]
        return subprocess.run(["git", *config, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.delenv("COMMIT", raising=False)
    assert results.commit() == "?"
    monkeypatch.setenv("COMMIT", "abc")
    assert results.commit() == "abc"
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD").strip()
    assert results.commit() == head
    (tmp_path / "file").write_text("2")
    assert results.commit() == f"{head}-dirty"
    # A folder of somebody else's checkout.
    monkeypatch.setattr(results, "ROOT", tmp_path / "inner")
    (tmp_path / "inner").mkdir()
    assert results.commit() == "abc"
