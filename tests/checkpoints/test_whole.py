"""Runs and their checkpoints: from which one a run goes on, which ones it keeps, and how it branches."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpointer.dcp import AsyncMode

from nitp_titan.checkpoints.find import reason_against
from nitp_titan.checkpoints.folder import WENT_BACK, saving
from nitp_titan.checkpoints.manager import CheckpointManager
from nitp_titan.job import JobError
from nitp_titan.runs.manifest import NAME, Manifest
from nitp_titan.runs.steps import METADATA, complete_steps
from tests.helpers.trainers import metric_lines, running, trainer_config

LOSS = "loss_metrics/global_avg_loss"


def run(folder: Path, corpus: Path, *, steps: int, fingerprint: dict[str, Any] | None = None, **keys: Any) -> Any:
    """Train the debug model to a step; return its weights."""
    keys = {"enable": True, "interval": 2, "last_save_model_only": False} | keys
    config = trainer_config(folder, corpus, checkpoint=CheckpointManager.Config(**keys))
    config.training.steps = steps
    config.lr_scheduler.total_steps = 20
    with running(config) as trainer:
        trainer.checkpointer.fingerprint = fingerprint or {}
        trainer.train()
        trainer.checkpointer.maybe_wait_for_saving()
        state = trainer.model_parts[0].state_dict().items()
        return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in state}


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line[LOSS] for line in metric_lines(folder)}


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 16
    file.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    """A run of 6 steps with checkpoints at 2, 4 and 6: its folder and weights."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder, corpus, steps=6)


@pytest.fixture
def parts(whole, tmp_path):
    """A copy of the first 4 steps of it."""
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "step-6")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    return tmp_path / "run"


def test_a_checkpoint_is_its_files_and_their_checksums(whole):
    checkpoints = whole[0] / "checkpoint"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-2", "step-4", "step-6"]
    for step in (2, 4, 6):
        place = checkpoints / f"step-{step}"
        manifest = Manifest.read(place)
        assert manifest is not None
        assert (manifest.step, manifest.holds) == (step, "everything")
        assert set(manifest.files) == {path.name for path in place.iterdir()} - {NAME}
        assert manifest.wrong_checksums(place, manifest.files) == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda step: flip(next(step.glob("*.distcp")), 10**6), "is damaged: it has another checksum"),
        (lambda step: next(step.glob("*.distcp")).unlink(), "is missing"),
        (lambda step: os.truncate(next(step.glob("*.distcp")), 10**5), "has 100,000 bytes, not"),
        (lambda step: flip(step / METADATA, 500), ".metadata is damaged: it has another checksum"),
        (lambda step: (step / METADATA).write_bytes(b""), "has 0 bytes, not"),
        (lambda step: (step / NAME).write_text("{}"), "its manifest.json is damaged"),
    ],
)  # fmt: skip
def test_the_latest_whole_one_is_gone_on_from(damage, reason, parts, whole, corpus, caplog):
    damage(parts / "checkpoint" / "step-4")
    weights = run(parts, corpus, steps=6)
    passed_over = [r.getMessage() for r in caplog.records if "is passed over" in r.getMessage()]
    assert len(passed_over) == 1
    assert "step-4" in passed_over[0]
    assert reason in passed_over[0]
    # What was undisturbed comes out again; what was damaged is set aside, and not resumed from any more.
    assert all(torch.equal(weights[name], value) for name, value in whole[1].items())
    assert min(losses(parts)) == 3
    assert complete_steps(parts / "checkpoint") == [2, 4, 6]
    assert (parts / "checkpoint" / "abandoned-4").is_dir()


def test_without_a_whole_one_a_run_does_not_start_anew_by_itself(parts, corpus):
    for step in (2, 4):
        flip(next((parts / "checkpoint" / f"step-{step}").glob("*.distcp")), 10**6)
    with pytest.raises(JobError) as caught:
        run(parts, corpus, steps=6)
    lines = str(caught.value).splitlines()
    assert [f"step-{step}" in line for step, line in zip((4, 2), lines, strict=False)] == [True, True]
    assert lines[-1] == f"{parts / 'checkpoint'}: has no whole checkpoint: move it away to start anew"
    assert complete_steps(parts / "checkpoint") == [2, 4]


def test_what_was_never_a_checkpoint_is_no_reason_not_to_start(tmp_path, corpus, caplog):
    # As TorchTitan leaves it when it is killed in a first save.
    (tmp_path / "run" / "checkpoint" / "step-2").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "step-2" / "__0_0.distcp").write_bytes(b"half")
    run(tmp_path / "run", corpus, steps=2)
    assert "step-2 is passed over: it is incomplete" in caplog.text
    assert complete_steps(tmp_path / "run" / "checkpoint") == [2]


def test_an_explicit_step_that_is_damaged_is_refused(parts, corpus):
    place = parts / "checkpoint" / "step-2"
    flip(next(place.glob("*.distcp")), 10**6)
    with pytest.raises(JobError, match=r"step-2: cannot be gone on from \(checkpoint\.load_step\): .* is damaged"):
        run(parts, corpus, steps=6, load_step=2)
    with pytest.raises(JobError, match="there is no such folder"):
        run(parts, corpus, steps=6, load_step=3)
    for keys in ({}, {"initial_load_model_only": False}):
        with pytest.raises(JobError, match=r"step-2: cannot be loaded: .* is damaged"):
            run(parts.parent / "other", corpus, steps=6, initial_load_path=str(place), **keys)
    # Whoever does not want files to be read may say so.
    run(parts.parent / "trusting", corpus, steps=1, initial_load_path=str(place), verify_checksums=False)


def test_a_checkpoint_of_before_there_were_manifests_is_loaded_and_verified(parts, whole, corpus, caplog):
    for step in (2, 4):
        (parts / "checkpoint" / f"step-{step}" / NAME).unlink()
    copy = shutil.copytree(parts, parts.parent / "copy")
    weights = run(copy, corpus, steps=6)
    assert min(losses(copy)) == 5
    assert all(torch.equal(weights[name], value) for name, value in whole[1].items())
    # In the numbers of the second moments, say.
    file = next((parts / "checkpoint" / "step-4").glob("*.distcp"))
    flip(file, file.stat().st_size // 2)
    run(parts, corpus, steps=6)
    assert "step-4 is passed over: " in caplog.text
    assert min(losses(parts)) == 3


def test_a_step_that_is_gone_back_before_is_set_aside(whole, corpus, tmp_path, caplog):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    run(folder, corpus, steps=3, load_step=2)
    names = sorted(path.name for path in (folder / "checkpoint").iterdir())
    assert names == [WENT_BACK, "abandoned-4", "abandoned-6", "step-2", "step-3"]
    assert "The run goes back to step-2: its later checkpoints are abandoned-4, abandoned-6 now" in caplog.text
    # The same command goes on from what it has saved since, as a restart does; unless it is told otherwise.
    run(folder, corpus, steps=5, load_step=2)
    assert "checkpoint.load_step = 2 was gone back to by an earlier start" in caplog.text
    assert complete_steps(folder / "checkpoint") == [2, 3, 4, 5]
    (folder / "checkpoint" / WENT_BACK).unlink()
    run(folder, corpus, steps=3, load_step=2)
    assert complete_steps(folder / "checkpoint") == [2, 3]
    assert (folder / "checkpoint" / "abandoned-4.2").is_dir()


def test_a_run_that_ended_with_its_weights_alone_is_complete(tmp_path, corpus):
    folder = tmp_path / "run"
    run(folder, corpus, steps=3, last_save_model_only=True)
    run(folder, corpus, steps=3, last_save_model_only=True)  # nothing to train, and nothing wrong
    with pytest.raises(JobError) as caught:
        run(folder, corpus, steps=5, last_save_model_only=True)
    assert "step-3: has no optimizer state" in str(caught.value)
    assert str(caught.value).endswith("; checkpoint.load_step = 2 goes back to the latest that it can go on from")
    run(folder, corpus, steps=5, load_step=2)
    assert complete_steps(folder / "checkpoint") == [2, 4, 5]


def test_a_run_that_counts_its_steps_anew_leaves_no_later_checkpoint(whole, corpus, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    run(folder, corpus, steps=3, exclude_from_loading=["train_state"])
    assert complete_steps(folder / "checkpoint") == [2, 3]


def test_any_flipped_bit_of_the_metadata_is_one_reason(whole, tmp_path):
    generator = random.Random(0)
    place = shutil.copytree(whole[0] / "checkpoint" / "step-6", tmp_path / "step-6")
    content = (place / METADATA).read_bytes()
    for sealed in (True, False):
        if not sealed:
            (place / NAME).unlink()
        for _ in range(60):
            changed = bytearray(content)
            changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            (place / METADATA).write_bytes(changed)
            reason = reason_against(place, checksums=False)
            assert isinstance(reason, str)
            assert reason or not sealed


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_so_many_are_kept_at_the_end(mode, tmp_path, corpus):
    folder = tmp_path / "run" / "checkpoint"
    for name in ("best-step-4", "step-4.bak", "step-99x"):
        (folder / name).mkdir(parents=True)
        (folder / name / METADATA).touch()
    run(tmp_path / "run", corpus, steps=9, interval=1, keep_latest_k=2, keep_every=3, async_mode=mode)
    assert complete_steps(folder) == [3, 6, 7, 8, 9]
    run(tmp_path / "run", corpus, steps=10, interval=1, keep_latest_k=2, async_mode=mode)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["best-step-4", "step-10", "step-4.bak", "step-9", "step-99x"]


@pytest.mark.parametrize("mode", [AsyncMode.ASYNC, AsyncMode.ASYNC_WITH_PINNED_MEM])
def test_one_that_is_saved_in_the_background_is_whole_too(mode, tmp_path, whole, corpus):
    if mode == AsyncMode.ASYNC_WITH_PINNED_MEM and not torch.cuda.is_available():
        pytest.skip("pinned memory takes a GPU")
    weights = run(tmp_path / "run", corpus, steps=4, async_mode=mode.value)
    place = tmp_path / "run" / "checkpoint" / "step-2"
    manifest = Manifest.read(place)
    assert manifest is not None
    assert manifest.wrong_checksums(place, manifest.files) == []
    run(tmp_path / "run", corpus, steps=6, async_mode=mode.value)
    assert losses(tmp_path / "run") == losses(whole[0])
    assert weights.keys() == whole[1].keys()


def test_a_branch_goes_on_in_full_and_leaves_its_parent_alone(whole, corpus, tmp_path):
    parent = whole[0] / "checkpoint" / "step-4"
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}
    weights = run(tmp_path / "branch", corpus, steps=6, branch_from=str(parent))
    assert all(torch.equal(weights[name], value) for name, value in whole[1].items())
    assert losses(tmp_path / "branch") == {step: loss for step, loss in losses(whole[0]).items() if step > 4}
    assert {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")} == before
    # Once it has checkpoints of its own, it goes on from these.
    run(tmp_path / "branch", corpus, steps=7, branch_from=str(parent))
    assert max(losses(tmp_path / "branch")) == 7


def test_what_an_interrupted_save_leaves_is_cleaned_up(parts, corpus, caplog):
    left = saving(parts / "checkpoint" / "step-6")
    shutil.copytree(parts / "checkpoint" / "step-4", left)
    (left / NAME).unlink()
    run(parts, corpus, steps=5)
    assert f"{left}: what an interrupted save had left is removed" in caplog.text
    assert not left.exists()


def test_a_fingerprint_is_saved_and_compared(tmp_path, corpus, caplog):
    first = {"model": {"a": 1}, "data": {"b": 1}, "versions": {"torch": "2.11"}}
    run(tmp_path / "run", corpus, steps=2, fingerprint=first)
    manifest = Manifest.read(tmp_path / "run" / "checkpoint" / "step-2")
    assert manifest is not None
    assert manifest.fingerprint == first
    second = {"model": {"a": 2}, "data": {"b": 2}, "versions": {"torch": "2.13"}}
    with pytest.raises(JobError) as caught:
        run(tmp_path / "run", corpus, steps=4, fingerprint=second, allow_changes=["data"])
    assert str(caught.value).endswith(
        'step-2: is of another model: a (was 1, is 2); restore it, or set checkpoint.allow_changes = ["model"]'
    )
    run(tmp_path / "run", corpus, steps=4, fingerprint=second, allow_changes=["data", "model"])
    assert 'Goes on from step-2 with other versions: torch (was "2.11", is "2.13")' in caplog.text
    assert "The data start afresh, since they are other data" in caplog.text
    # Another run's weights alone are nobody's history.
    weights = {"initial_load_path": str(tmp_path / "run" / "checkpoint" / "step-2")}
    run(tmp_path / "new", corpus, steps=1, fingerprint={"model": {"a": 3}}, **weights)
