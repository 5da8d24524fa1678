"""A job is looked at on one machine and meant for another."""

from __future__ import annotations

import pytest

from nitp_titan.job import load_job
from nitp_titan.runtime import machine


@pytest.fixture(autouse=True)
def no_gpu_here(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 13))


def test_the_defaults_are_those_of_the_device():
    def chosen(device: str) -> tuple:
        with machine.meant_for(device):
            job = load_job(None, ["--model.flavor=0.5B", "--nitp.geometry_freq=0"], 1)
        training = job["training"]
        return training["mixed_precision_param"], training["disable_cuda_graphs"], job["optimizer"]["implementation"]

    assert chosen("h100") == ("bfloat16", False, "fused")
    assert chosen("cpu") == chosen("here") == ("float32", True, "foreach")


def test_the_device_is_this_one_again_afterwards():
    with machine.meant_for("h100"):
        assert (machine.has_gpu(), machine.gpu_capability()) == (True, machine.HOPPER)
        with machine.meant_for("cpu"):
            assert (machine.has_gpu(), machine.gpu_capability()) == (False, None)
        assert machine.has_gpu()
    assert (machine.device(), machine.has_gpu(), machine.gpu_capability()) == ("here", False, None)


def test_a_job_is_meant_for_a_gpu_unless_it_is_a_debug_models(monkeypatch):
    assert [machine.usual_device(flavor) for flavor in ("debug", "debug_moe", "debugmodel")] == ["here"] * 3
    assert machine.usual_device("0.5B") == "h100"
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert machine.usual_device("0.5B") == "here"


@pytest.mark.parametrize(
    ("model", "capability"),
    [("NVIDIA H100 80GB HBM3", machine.HOPPER), ("NVIDIA GH200 480GB", machine.HOPPER), ("NVIDIA H20", machine.HOPPER),
     ("NVIDIA B200", machine.BLACKWELL), ("NVIDIA A100-SXM4-80GB", None), ("NVIDIA RTX A2000", None)],
)  # fmt: skip
def test_the_driver_tells_the_generation_of_a_gpu(tmp_path, monkeypatch, model, capability):
    folder = tmp_path / "0000:00:1e.0"
    folder.mkdir()
    (folder / "information").write_text(f"Model: \t\t {model}\nIRQ: 7\n")
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(machine, "_GPU_FOLDERS", tmp_path)
    assert machine.gpu_capability() == capability
