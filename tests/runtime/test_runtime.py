"""The shims: said in full, applied by prepare() alone, in any order of imports."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed

from nitp_titan.runtime import prepare, shims
from nitp_titan.runtime.shims import torch_gaps
from nitp_titan.runtime.shims.cpu_device import CPUDeviceModule


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_every_shim_says_what_why_and_until_when():
    for shim in shims():
        assert shim.target
        assert shim.reason
        assert shim.until


def test_prepare_applies_once():
    assert prepare() is prepare()


def test_importing_the_mathematics_patches_nothing():
    code = """
import torch.distributed
before = dict(vars(torch.distributed))
import nitp_titan.nitp.objective, nitp_titan.nitp.geometry, nitp_titan.runtime
import sys
print(vars(torch.distributed) == before, any(name.startswith("torchtitan") for name in sys.modules))
"""
    assert run(code) == "True False"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_prepare_also_works_after_torchtitans_trainer_was_imported():
    code = """
import torchtitan.trainer
from nitp_titan.runtime import prepare
prepare()
import torchtitan.components.metrics as metrics, torchtitan.distributed.parallel_dims as dims
import torchtitan.distributed.utils as utils, torchtitan.tools.utils as tools
print(metrics.device_type, dims.device_type, utils.device_type, tools.get_local_device.__module__)
print(metrics.device_module is tools.device_module is utils.device_module)
"""
    assert run(code).splitlines() == ["cpu cpu cpu torchtitan.tools.utils", "True"]


def test_device_module_answers_what_torchtitan_asks():
    device = CPUDeviceModule()
    assert device.current_device() == 0
    assert device.device_count() == 1
    assert device.get_device_name()
    assert device.get_device_properties().total_memory > 2**28
    stats = device.memory_stats()
    assert 2**20 < stats["active_bytes.all.peak"] < device.get_device_properties().total_memory
    assert stats["num_ooms"] == 0
    device.set_device("cpu:0")
    device.reset_peak_memory_stats()
    device.empty_cache()
    device.synchronize()


def test_set_timeout_reaches_the_process_group(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_set_pg_timeout", lambda *args: seen.append(args))
    torch_gaps._set_timeout(timedelta(seconds=3), None)
    assert seen == [(timedelta(seconds=3), None)]


def test_names_that_torchtitan_imports_are_there():
    assert hasattr(torch.distributed, "set_timeout")
    assert hasattr(torch.distributed.fsdp, "DataParallelMeshDims")
