"""nitp_titan.runs.steps"""

from __future__ import annotations

from pathlib import Path

from torchtitan.components.checkpointer import CheckpointManager

from nitp_titan.runs.steps import HF_INDEX, METADATA, complete_steps, is_complete


def save(folder: Path, *names: str, mark: str = METADATA) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / mark).touch()


def test_steps_are_numbers_of_whole_checkpoints(tmp_path):
    save(tmp_path, "step-10", "step-9", "step-0", "step-8.bak", "best-step-11", "step-x", "step-", "step--1")
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-13").touch()
    assert complete_steps(tmp_path) == [0, 9, 10]
    assert complete_steps(tmp_path / "none") == []
    assert complete_steps(tmp_path / "step-13") == []


def test_a_hugging_face_checkpoint_counts_where_it_is_asked_for(tmp_path):
    save(tmp_path, "step-1")
    save(tmp_path, "step-2", mark=HF_INDEX)
    assert complete_steps(tmp_path) == [1]
    assert complete_steps(tmp_path, [METADATA, HF_INDEX]) == [1, 2]
    assert not is_complete(tmp_path / "step-2")
    assert is_complete(tmp_path / "step-2", [HF_INDEX])


def test_the_latest_is_torchtitans(tmp_path):
    save(tmp_path, "step-3", "step-20", "step-100")
    (tmp_path / "step-100" / METADATA).unlink()
    manager = CheckpointManager.__new__(CheckpointManager)
    manager.folder = str(tmp_path)
    assert complete_steps(tmp_path)[-1] == manager._find_load_step() == 20
