"""Runs that gain their projector on the way."""

from __future__ import annotations

import pytest

from tests.commands import call, debug_job, losses


def test_a_run_resumes_from_before_its_start_step(tmp_path):
    late = "--nitp.start_step=3"
    assert call(*debug_job(tmp_path / "whole", "--training.steps=4", late)).returncode == 0
    assert call(*debug_job(tmp_path / "parts", "--training.steps=2", late)).returncode == 0
    resumed = call(*debug_job(tmp_path / "parts", "--training.steps=4", late))
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def test_nitp_starts_from_a_checkpoint_of_stock_torchtitan(tmp_path):
    assert call(*debug_job(tmp_path / "stock", "--training.steps=2", "--nitp.no-enable")).returncode == 0
    resumed = call(*debug_job(tmp_path / "stock", "--training.steps=3"))
    assert resumed.returncode == 0, resumed.stderr
    assert "has no projector" in resumed.stdout
    assert "Training starts at step 3" in resumed.stdout
    fresh = ("--checkpoint.initial_load_path", str(tmp_path / "stock" / "checkpoint" / "step-2"))
    started = call(*debug_job(tmp_path / "fresh", "--training.steps=1", *fresh))
    assert started.returncode == 0, started.stderr
    assert losses(tmp_path / "fresh")[1] < losses(tmp_path / "stock")[1] + 1
