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
    assert results.commit() == "abc"  # what is said outright
    monkeypatch.delenv("COMMIT")
    assert results.commit() == head
    (tmp_path / "file").write_text("2")
    assert results.commit() == f"{head}-dirty"
    monkeypatch.setenv("COMMIT", "abc")
    # A folder of somebody else's checkout.
    monkeypatch.setattr(results, "ROOT", tmp_path / "inner")
    (tmp_path / "inner").mkdir()
    assert results.commit() == "abc"


def test_facts_of_a_gpu(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.159.04, 1980, 3201, 700.00, 143771'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results.gpu_facts() == {
        "driver": "580.159.04",
        "sm_clock_max_mhz": 1980,
        "memory_clock_mhz": 3201,
        "power_limit_w": 700,
        "memory_mib": 143771,
    }
    program.unlink()
    assert results.gpu_facts() == {}
