"""Versions, devices and what works with them (``nitp_titan/env.py``)."""

import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

from nitp_titan.runtime import support
from nitp_titan.runtime.support import Device, what_works
from nitp_titan.tools import env
from nitp_titan.tools.env import environment_report, render_report, version_warnings

CPU = Device(type="cpu", name="Some CPU", count=2, backends=("gloo",), compiler="g++")
H100 = Device(
    type="cuda",
    name="NVIDIA H100",
    count=8,
    capability=(9, 0),
    backends=("nccl", "gloo"),
    compiler="gcc",
    details=(("memory", "79.1 GiB each"), ("capability", "9.0"), ("runtime", "CUDA 13.0, driver 580.95.05")),
)
A100 = Device(type="cuda", name="NVIDIA A100", capability=(8, 0), backends=("nccl", "gloo"), compiler="gcc")
MI300 = Device(type="rocm", name="AMD MI300X", backends=("nccl", "gloo"), compiler="gcc")
VERSIONS = {"python": "3.11.7", "torch": "2.13.0+cpu", "torchtitan": "0.3.0", "transformers": None}


def verdicts(torch: tuple[int, int], device: Device) -> dict[str, support.Row]:
    return {row.name: row for row in what_works(torch, device)}


@pytest.mark.parametrize(
    ("name", "torch", "device", "works", "reason"),
    [
        ("training", (2, 13), CPU, True, "gloo"),
        ("training", (2, 11), H100, True, "nccl"),
        ("training", (2, 13), Device(type="cuda", name="x", backends=("gloo",)), False, "without nccl"),
        ("torch.compile", (2, 13), CPU, True, "g++"),
        ("torch.compile", (2, 13), Device(type="cpu", name="x"), False, "CXX"),
        ("flex attention", (2, 13), CPU, False, "SDPA"),
        ("flex attention", (2, 11), H100, True, ""),
        ("float8", (2, 13), H100, True, ""),
        ("float8", (2, 13), Device(type="cuda", name="NVIDIA L4", capability=(8, 9)), True, ""),
        ("float8", (2, 13), A100, False, "this is 8.0; emulated"),
        ("float8", (2, 13), CPU, False, "emulated"),
        ("float8", (2, 13), MI300, False, "AMD"),
        ("CUDA graphs", (2, 13), CPU, False, "NVIDIA GPU"),
        ("CUDA graphs", (2, 13), MI300, False, "NVIDIA GPU"),
        ("CUDA graphs", (2, 13), A100, True, "dense"),
        ("CUDA graphs", (2, 12), A100, False, "torch >= 2.13"),
        ("expert parallelism", (2, 11), H100, False, "torch >= 2.13, this is 2.11"),
        ("expert parallelism", (2, 13), CPU, True, ""),
        ("expert parallelism", (2, 15), CPU, False, "gloo"),
        ("expert parallelism", (2, 15), H100, True, ""),
        ("upstream's chunked cross-entropy", (2, 12), H100, False, "torch >= 2.13"),
        ("upstream's chunked cross-entropy", (2, 13), CPU, True, ""),
        ("pipeline parallelism", (2, 12), H100, False, "torch >= 2.13, this is 2.12"),
        ("pipeline parallelism", (2, 13), CPU, True, ""),
        ("context parallelism", (2, 11), H100, True, ""),
        ("context parallelism", (2, 13), CPU, True, "dense mask"),
        ("python -m torchtitan.train", (2, 13), CPU, False, "torch >= 2.14 (this is 2.13) and a GPU"),
        ("python -m torchtitan.train", (2, 14), CPU, False, "needs a GPU"),
        ("python -m torchtitan.train", (2, 13), H100, False, "needs torch >= 2.14"),
        ("python -m torchtitan.train", (2, 14), H100, True, ""),
    ],
)
def test_what_works(name: str, torch: tuple[int, int], device: Device, works: bool, reason: str):
    row = verdicts(torch, device)[name]
    assert row.works is works
    assert reason in row.reason


@pytest.mark.parametrize("torch", [(2, 11), (2, 13), (2, 15)])
@pytest.mark.parametrize("device", [CPU, H100, A100, MI300])
def test_every_no_has_a_reason(torch: tuple[int, int], device: Device):
    assert all(row.works or row.reason for row in what_works(torch, device))


@pytest.mark.parametrize("torch", ["2.11.0", "2.11.0+cu130", "2.13.0", "2.15.0.dev20260801", "2.15.2"])
def test_no_warning_in_range(torch: str):
    assert version_warnings({"torch": torch, "torchtitan": "0.3.2"}) == []


@pytest.mark.parametrize(
    ("versions", "warning"),
    [
        ({"torch": "2.10.1", "torchtitan": "0.3.0"}, "torch 2.10.1 is outside >=2.11,<2.16"),
        ({"torch": "2.16.0a0+git1234", "torchtitan": "0.3.0"}, "torch 2.16.0a0+git1234 is outside"),
        ({"torch": "3.0.0", "torchtitan": "0.3.0"}, "torch 3.0.0 is outside"),
        ({"torch": None, "torchtitan": "0.3.0"}, "torch is not installed"),
        ({"torch": "2.13.0", "torchtitan": "0.2.2"}, "torchtitan 0.2.2 is not 0.3.*"),
        ({"torch": "2.13.0", "torchtitan": "0.30.0"}, "torchtitan 0.30.0 is not 0.3.*"),
        ({"torch": "2.13.0", "torchtitan": None}, "torchtitan is not installed"),
    ],
)
def test_version_warning(versions: dict[str, str | None], warning: str):
    (found,) = version_warnings(versions)
    assert warning in found
    assert f"Warning: {found}" in render_report(versions, CPU)


def test_report_columns_are_aligned():
    report = render_report(VERSIONS, H100)
    assert "8 x NVIDIA H100" in report
    assert re.search(r"^  transformers +not installed$", report, re.MULTILINE)
    facts = [line for line in report.splitlines() if line.startswith("  ")]
    label_width = max(len(name) for name, _ in support.FEATURES)
    assert all(line[2 + label_width : 4 + label_width] == "  " and line[4 + label_width] != " " for line in facts)
    assert not any(line.endswith(" ") for line in report.splitlines())


@pytest.mark.parametrize("width", [64, 80, 100])
def test_report_fits_a_terminal(width: int):
    report = render_report(VERSIONS | {"torch": "2.10.0"}, CPU, width=width)
    assert max(map(len, report.splitlines())) <= width
    whole = render_report(VERSIONS | {"torch": "2.10.0"}, CPU)
    assert report.split() == whole.split()


def test_report_without_a_usable_torch():
    report = render_report({"torch": "2.13.0", "torchtitan": "0.3.0"}, None, failure="ImportError: libcudart.so.13")
    assert "Warning: torch cannot be imported" in report
    assert "libcudart.so.13" in report
    assert "What works here" not in report


def test_environment_report_of_this_machine():
    import torch

    report = environment_report()
    versions = env.installed_versions()
    assert set(versions) == {"python", *env.PACKAGES}
    for name, version in versions.items():
        assert re.search(rf"^  {name} +{re.escape(version or 'not installed')}$", report, re.MULTILINE)
    assert re.search(r"^  training +yes", report, re.MULTILINE)
    assert re.search(r"^  GPU +\d+ x " if torch.cuda.is_available() else r"^  CPU +", report, re.MULTILINE)
    assert "\x1b" not in report


@pytest.mark.parametrize(
    ("line", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", "580.95.05"),
    ],
)
def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch, line: str, driver: str):
    import torch

    gpus = [
        SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30),
        SimpleNamespace(name="NVIDIA A100", major=8, minor=0, total_memory=40 * 2**30),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(env, "_read", lambda path: line + "\n" if "nvidia" in path else "")
    device = env.find_device()
    assert (device.type, device.count, device.capability) == ("cuda", 2, (8, 0))
    report = render_report(VERSIONS, device)
    for text in ("2 x NVIDIA H100 / NVIDIA A100", "40.0 GiB / 80.0 GiB each", f"CUDA 13.0, driver {driver}"):
        assert text in report


def test_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch):
    import torch

    def too_old() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(env, "_nvidia_driver", lambda: "470.1")
    device = env.find_device()
    assert device.type == "cpu"
    assert re.search(r"built for CUDA 13\.0, NVIDIA driver 470\.1; torch: .* too old", dict(device.details)["GPU"])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for CPUs only" in dict(env.find_device().details)["GPU"]


def test_torch_failure_is_reported(monkeypatch: pytest.MonkeyPatch):
    def broken() -> Device:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(env, "find_device", broken)
    assert "OSError: libcudart.so.13: cannot open" in environment_report()


def test_import_is_free_of_torch():
    code = "import sys, nitp_titan.tools.env; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
