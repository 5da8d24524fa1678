"""Attention kernels that are not installed are refused in a sentence, for the device that the job is meant for."""

from __future__ import annotations

import pytest

from nitp_titan.job import JobError, load_job
from nitp_titan.job.build import build_trainer_config
from nitp_titan.job.checks import attention
from nitp_titan.job.checks.attention import FA3, FA4, missing_kernel
from nitp_titan.runtime import machine

AMPERE = (8, 0)


@pytest.fixture
def installed(monkeypatch):
    modules: set[str] = set()
    monkeypatch.setattr(machine, "has_module", modules.__contains__)
    return modules


@pytest.mark.parametrize(
    ("backend", "capability", "needed"),
    [
        ("flex", machine.HOPPER, None),
        ("varlen", AMPERE, None),
        ("varlen", machine.HOPPER, FA3),
        ("varlen", machine.BLACKWELL, FA4),
        ("flex_flash", machine.HOPPER, FA4),
        ("flex_flash", machine.BLACKWELL, FA4),
    ],
)
def test_kernels_that_a_gpu_needs(installed, backend, capability, needed):
    message = missing_kernel(backend, capability)
    if needed is None:
        assert message == ""
        return
    name = "Hopper" if capability == machine.HOPPER else "Blackwell"
    assert message.startswith(f'found "{backend}", which on a {name} GPU needs {needed} (')
    installed.add(needed)
    assert missing_kernel(backend, capability) == ""


def test_flash_kernels_of_flex_attention_are_for_hopper_and_later(installed):
    installed.add(FA4)
    assert missing_kernel("flex_flash", AMPERE) == 'found "flex_flash", which needs a Hopper or Blackwell GPU'


@pytest.mark.parametrize("backend", ["varlen", "flex_flash"])
def test_a_job_for_an_h100_is_refused_and_one_for_a_cpu_is_not(installed, backend):
    job = [f"--model.attn_backend={backend}"]
    with machine.meant_for("h100"):
        with pytest.raises(JobError) as caught:
            load_job(None, job, 1)
        [problem] = caught.value.problems
        assert problem.key == "--model.attn_backend"
        assert "on a Hopper GPU needs" in problem.message
        installed.update((FA3, FA4))
        assert load_job(None, job, 1).warnings == ()
    with machine.meant_for("cpu"):
        [warning] = load_job(None, job, 1).warnings
        assert f'expected "flex": {backend} needs a GPU' in str(warning)


@pytest.mark.parametrize("backend", ["varlen", "flex_flash"])
def test_a_start_on_a_gpu_is_refused_whatever_its_name(installed, monkeypatch, backend):
    import torch

    build_trainer_config(load_job(None, [], 1))  # imports what looks for a GPU in its turn
    job = load_job(None, [f"--model.attn_backend={backend}"], 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(JobError, match=f'attn_backend: found "{backend}", which on a Hopper GPU needs'):
        build_trainer_config(job)


def test_a_backend_that_torchtitan_refuses_is_no_traceback(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    with pytest.raises(JobError, match="attn_backend: Flash backend of FlexAttention is only supported on Hopper"):
        build_trainer_config(load_job(None, ["--model.attn_backend=flex_flash"], 1))


def test_a_dry_run_for_an_h100_needs_none(installed, monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    installed.add(FA4)
    with machine.meant_for("h100"):
        config = build_trainer_config(load_job(None, ["--model.attn_backend=flex_flash"], 1))
    assert config.model_spec.flavor == "debug"


def test_modules_are_found_without_running_them(tmp_path, monkeypatch):
    (tmp_path / "kernels" / "cute").mkdir(parents=True)
    (tmp_path / "kernels" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "kernels" / "cute" / "interface.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.has_module("kernels")
    assert machine.has_module("kernels.cute.interface")
    assert not machine.has_module("kernels.cute.other")
    assert not machine.has_module("no_kernels")
    assert attention.FA3 == "flash_attn_interface"
