"""A GPU computes what a CPU does: flex attention what the CPU's stand-in does, and the losses' own ways on each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(flavor: str, file: Path, *, gpu: bool) -> dict[str, torch.Tensor]:
    env = dict(os.environ) if gpu else os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "tests.device_run", flavor, str(file)], env=env, cwd=ROOT, check=True)
    return torch.load(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flavor", "gpu"),
    [
        ("debug_moe", False),  # that the comparison itself works
        pytest.param("debug", True, marks=pytest.mark.gpu),
        pytest.param("debug_moe", True, marks=pytest.mark.gpu),
    ],
)
def test_losses_and_gradients_are_a_cpus(flavor, gpu, tmp_path):
    if gpu and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    expected = run(flavor, tmp_path / "cpu.pt", gpu=False)
    found = run(flavor, tmp_path / "found.pt", gpu=gpu)
    assert expected.pop("waits") == 0
    waits = found.pop("waits")
    assert {"ntp", "nitp", "projector.w1.weight", "lm_head.weight", "layers.0.attention_norm.weight"} <= set(expected)
    assert found.keys() == expected.keys()
    assert all(value.isfinite().all() and value.norm() > 0 for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name
    assert waits == 0
