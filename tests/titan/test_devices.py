"""A GPU computes what a CPU does: flex attention what the CPU's stand-in does, and the losses' own ways on each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


def run(flavor: str, file: Path, *options: str, gpu: bool) -> dict[str, torch.Tensor]:
    if gpu and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    env = dict(os.environ) if gpu else os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.device_run", flavor, str(file), *options]
    subprocess.run(command, env=env, cwd=ROOT, check=True)
    return torch.load(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flavor", "options", "gpu"),
    [
        pytest.param("debug_moe", [], False, id="cpu-debug_moe"),  # that the comparison itself works
        pytest.param("debug", ["--compile"], True, marks=pytest.mark.gpu, id="compiled_in_float32-debug"),
        pytest.param("debug_moe", ["--compile"], True, marks=pytest.mark.gpu, id="compiled_in_float32-debug_moe"),
        pytest.param("debug", [], True, marks=pytest.mark.gpu, id="eager-debug"),
    ],
)
def test_losses_and_gradients_are_a_cpus(flavor, options, gpu, tmp_path):
    found = run(flavor, tmp_path / "found.pt", *options, gpu=gpu)
    expected = run(flavor, tmp_path / "cpu.pt", gpu=False)
    found.pop("waits"), expected.pop("waits")
    assert {"ntp", "nitp", "projector.w1.weight", "lm_head.weight", "layers.0.attention_norm.weight"} <= set(expected)
    assert found.keys() == expected.keys()
    assert all(value.isfinite().all() and value.norm() > 0 for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("flavor", ["debug", "debug_moe"])
def test_a_compiled_step_in_bf16_waits_for_nothing(flavor, tmp_path):
    # In fp32 torch's grouped product reads the experts' shares on the host: experts are for bf16 on a GPU.
    found = run(flavor, tmp_path / "found.pt", "--compile", "--dtype", "bfloat16", gpu=True)
    assert all(value.isfinite().all() for value in found.values())
    assert found["waits"] == 0
    expected = run(flavor, tmp_path / "cpu.pt", gpu=False)
    for name in ("ntp", "nitp"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=2e-2)
