"""The resolved files of a run's starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from nitp_titan.job import Job, load_job
from nitp_titan.job.earlier import changes_since, write_beside_earlier
from nitp_titan.job.write import resolved_toml


@pytest.fixture
def start(tmp_path):
    (tmp_path / "job.toml").write_text('[model]\nflavor = "debug"\n')

    def job(*words: str, file: str = "job.toml", ranks: int = 1) -> Job:
        return load_job(tmp_path / file, list(words), ranks)

    return job


def test_the_earlier_files_are_kept_and_the_oldest_is_1(start, tmp_path):
    resolved, texts = tmp_path / "run" / "config.toml", []
    for steps in (4, 4, 6, 8):
        job = start(f"--training.steps={steps}")
        write_beside_earlier(job, resolved)
        texts.append(resolved_toml(job))
        assert resolved.read_text() == texts[-1]
    names = ["config.1.toml", "config.2.toml", "config.toml"]
    assert sorted(path.name for path in resolved.parent.iterdir()) == names
    assert [(resolved.parent / name).read_text() for name in names] == [texts[0], texts[2], texts[3]]


def test_a_run_from_its_own_file_keeps_it_unless_a_value_changes(start, tmp_path):
    resolved = tmp_path / "config.toml"
    write_beside_earlier(start("--training.steps=4"), resolved)
    first = resolved.read_text()
    write_beside_earlier(start(file="config.toml"), resolved)
    assert resolved.read_text() == first
    assert not (tmp_path / "config.1.toml").exists()
    write_beside_earlier(start("--training.steps=5", file="config.toml"), resolved)
    assert (tmp_path / "config.1.toml").read_text() == first
    assert "steps = 5  # command line" in resolved.read_text()


def test_each_setting_that_differs_is_said_but_those_of_logging(start, tmp_path):
    resolved = tmp_path / "config.toml"
    assert changes_since(resolved, start()) == []
    write_beside_earlier(start("--nitp.target_layer=2"), resolved)
    assert changes_since(resolved, start("--nitp.target_layer=2", "--metrics.log_freq=3", "--job.description=x")) == []
    job = start("--optimizer.lr=0.5", "--model.shape.n_layers=4", "--nitp.target_layer=1", "--dataloader.no-infinite")
    assert changes_since(resolved, job) == [
        "model.shape.n_layers = 4, was 6",
        "nitp.target_layer = 1, was 2",
        "dataloader.infinite = false, was true",
        "optimizer.lr = 0.5, was 0.002",
        "validator.dataloader.infinite = false, was true",
    ]


def test_a_file_that_is_none_is_said_and_kept(start, tmp_path):
    resolved = tmp_path / "config.toml"
    resolved.write_text("[training\n")
    [change] = changes_since(resolved, start())
    assert change.startswith(f"not known: {resolved} of the earlier start is no TOML")
    write_beside_earlier(start(), resolved)
    assert (tmp_path / "config.1.toml").read_text() == "[training\n"


def test_files_of_other_names_do_not_count(start, tmp_path):
    resolved: Path = tmp_path / "config.toml"
    for name in ("config.7.toml", "config.old.toml", "config.8.toml.bak"):
        (tmp_path / name).touch()
    resolved.write_text("")
    write_beside_earlier(start(), resolved)
    assert (tmp_path / "config.8.toml").read_text() == ""
