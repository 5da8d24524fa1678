"""nitp_titan.checkpoints.fingerprint and nitp_titan.job.fingerprint: what differs is refused, said or nobody's."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nitp_titan.checkpoints.fingerprint import REFUSED, SAID, differences, refusals
from nitp_titan.job import load_job
from nitp_titan.job.fingerprint import fingerprint
from nitp_titan.job.keys.schema import all_tables

FILE = "train_configs/debug.toml"


def of(*words: str, ranks: int = 1):
    return fingerprint(load_job(FILE, list(words), ranks))


def compared(*words: str, ranks: int = 1):
    # As it comes back from a manifest.
    return differences(json.loads(json.dumps(of())), of(*words, ranks=ranks))


def test_the_same_job_does_not_differ():
    assert compared() == []


@pytest.mark.parametrize(
    ("words", "group", "text"),
    [
        (["--model.shape.n_layers=4"], "model", "model.shape.n_layers (was 6, is 4)"),
        (["--dataloader.seed=1"], "data", "dataloader.seed (was 0, is 1)"),
        (["--dataloader.on_bad_text=skip"], "data", 'dataloader.on_bad_text (was "error", is "skip")'),
        (["--training.seq_len=64"], "data", "training.seq_len (was 256, is 64)"),
        (["--optimizer.name=Adam"], "optimizer", 'optimizer.name (was "AdamW", is "Adam")'),
    ],
)
def test_another_run_is_refused_unless_it_is_allowed(words, group, text):
    found = compared(*words)
    assert [str(one) for one in found if one.refused] == [text]
    what = "other data" if group == "data" else f"another {group}"
    sentence = f'is of {what}: {text}; restore it, or set checkpoint.allow_changes = ["{group}"]'
    assert refusals(found, []) == [sentence]
    assert refusals(found, [other for other in REFUSED if other != group]) == [sentence]
    assert refusals(found, [group]) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optimizer.lr=0.5"], ["optimizer.lr (was 0.002, is 0.5)"]),
        (["--nitp.weight=0.5"], ["nitp.weight (was 1.0, is 0.5)"]),
        (["--nitp.no-enable"], ["nitp.enable (was true, is false)"]),
        (["--nitp.target_layer=3"], None),
        (["--lr_scheduler.warmup_steps=3"], ["lr_scheduler.warmup_steps (was 20, is 3)"]),
        (["--training.global_batch_size=16"], ["training.global_batch_size (was 8, is 16)"]),
        (["--training.steps=300"], ["training.steps (was 200, is 300)"]),
        (["--training.mixed_precision_param=bfloat16"], None),
    ],
)
def test_what_may_change_is_said(words, said):
    found = compared(*words)
    assert found
    assert not any(one.refused for one in found)
    assert {one.group for one in found} <= set(SAID)
    if said:
        assert [str(one) for one in found] == said


@pytest.mark.parametrize(
    "words",
    [
        ["--metrics.log_freq=7"],
        ["--dataloader.prefetch=0"],
        ["--checkpoint.interval=3"],
        ["--nitp.geometry_freq=3"],
        ["--job.dump_folder=elsewhere"],
        ["--training.local_batch_size=4", "--training.global_batch_size=8"],
    ],
)
def test_what_computes_the_same_is_nobodys_business(words):
    assert compared(*words) == []


def test_ranks_are_said():
    assert "ranks (was 1, is 2)" in [str(one) for one in compared(ranks=2)]


def test_a_tokenizer_is_its_files_and_not_their_place(tmp_path):
    for name, text in (("a", "{}"), ("b", "{}"), ("c", "{ }")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)

    def tokenizer(name: str):
        job = load_job(FILE, [], 1)
        tables = {**job.tables, "tokenizer": {**job["tokenizer"], "name": "huggingface"}}
        tables["model"] = {**job["model"], "hf_assets_path": str(tmp_path / name)}
        return fingerprint(dataclasses.replace(job, tables=tables))

    assert differences(tokenizer("a"), tokenizer("b")) == []
    [one] = differences(tokenizer("a"), tokenizer("c"))
    assert (one.group, one.key) == ("tokenizer", "tokenizer.json")


def test_what_another_version_does_not_know_is_not_compared():
    then = of()
    then["data"].pop("dataloader.seed")
    then["model"]["model.shape.of_before"] = 1
    then.pop("layout")
    assert differences(then, of()) == []


def test_every_key_that_is_compared_is_a_jobs():
    keys = {f"{table}.{name}" for table, names in all_tables().items() for name in names}
    for group, values in of().items():
        if group not in ("versions", "origin"):
            assert set(values) - keys <= {"ranks"}, group
