"""Flex attention's kernel options: what a head dim gets, what a job sets, and that torch knows them all."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from torch.nn.attention import flex_attention
from torchtitan.models.common.attention import FlexAttention

from nitp_titan.job import JobError, load_job
from nitp_titan.job.backbone import model_spec
from nitp_titan.job.build import build_trainer_config
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.models.flex_options import FlexKernelOptions, default_options, problems


def options_of(spec) -> list[dict]:
    return [config.kernel_options for _, config, _, _ in spec.traverse(FlexAttention.Config)]


def test_torch_knows_every_name():
    known = inspect.getsource(flex_attention.FlexKernelOptions)
    for field in dataclasses.fields(FlexKernelOptions):
        name = field.name.removeprefix("fwd_").removeprefix("bwd_")
        assert f"{name}:" in known, name


@pytest.mark.parametrize("flavor", FLAVORS)
def test_defaults_can_be_had(flavor):
    options = default_options(FLAVORS[flavor].shape.head_dim)
    assert not list(problems(options))
    assert all(found == options for found in options_of(model_spec("nitp_titan", flavor, "flex")))


@pytest.mark.parametrize(("module", "flavor"), [("nitp_titan", "9B-A1B"), ("llama3", "debugmodel")])
def test_a_jobs_options_come_over_the_models(module, flavor):
    spec = model_spec(module, flavor, "flex", flex_options={"fwd_num_stages": 1})
    before = options_of(model_spec(module, flavor, "flex"))
    found = options_of(spec)
    assert found == [options | {"fwd_num_stages": 1} for options in before]
    assert len(found) == len(spec.model.layers)


def test_a_job_sets_them():
    words = ["--model.flex_kernel_options.fwd_BLOCK_M", "64"]
    job = load_job("train_configs/debug.toml", words, 1)
    assert options_of(build_trainer_config(job).model_spec) == [{"fwd_BLOCK_M": 64}] * 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fwd_BLOCK_M=48"], "found 48, expected one of 16, 32, 64, 128"),
        (["bwd_num_warps=3"], "found 3, expected one of 1, 2, 4, 8"),
        (["fwd_num_stages=0"], "found 0, expected one of 1, 2, 3, 4, 5"),
        (["bwd_BLOCK_N1=32", "bwd_BLOCK_M1=64"], "found 32, expected a multiple of bwd_BLOCK_M1, 64"),
        (["bwd_BLOCK_M2=32", "bwd_BLOCK_N2=64"], "found 32, expected a multiple of bwd_BLOCK_N2, 64"),
        (["fwd_BLOCK_MM=64"], "fwd_BLOCK_M"),
    ],
)
def test_what_a_kernel_cannot_have_is_refused(words, message):
    with pytest.raises(JobError, match=message):
        load_job("train_configs/debug.toml", [f"--model.flex_kernel_options.{word}" for word in words], 1)


def test_options_of_another_kernel_are_refused():
    words = ["--model.attn_backend=flex_flash", "--model.flex_kernel_options.fwd_BLOCK_M=64"]
    with pytest.raises(JobError, match='for attn_backend "flex", not "flex_flash"'):
        load_job("train_configs/debug.toml", words, 1)
