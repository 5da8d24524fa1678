"""What is said of a pipeline before it starts, against the classes of torch and TorchTitan that would refuse it."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

from nitp_titan.job import JobError, load_job
from nitp_titan.job.checks.pipeline import SCHEDULES, V_SHAPED, _fits, _orders, _stages_per_rank, blocks_of_stages
from nitp_titan.runtime import machine


@pytest.fixture(autouse=True)
def machine_of_the_tests(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 13))


def problems(*overrides: str, ranks: int = 2) -> list[str]:
    keys = [f"--parallelism.{override}" if "." not in override else f"--{override}" for override in overrides]
    try:
        load_job(None, ["--training.local_batch_size=4", *keys], ranks, for_training=False)
    except JobError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("first", "last"), [(1, 1), (0, 0), (2, 1), (1, 3)])
def test_stages_fit_where_torchtitan_can_make_them(schedule, first, last):
    module = importlib.import_module("torchtitan.distributed.pipeline_parallel")
    for depth in range(1, 14):
        for degree in (2, 3, 4):
            stages = degree * _stages_per_rank(schedule)
            try:
                names = module._generate_llm_fqn_per_model_part(stages, depth, first, last)
            except ValueError:
                assert not _fits(depth, degree, schedule, first, last), (depth, degree)
                continue
            assert _fits(depth, degree, schedule, first, last), (depth, degree)
            blocks = [sum(name.startswith("layers.") for name in stage) for stage in names]
            assert blocks_of_stages(depth, stages, first, last) == blocks, (depth, degree)


def accepts(schedule: str, number: int, degree: int) -> bool:
    """Whether torch's class of this schedule can be made on a rank's stages."""
    module = importlib.import_module("torch.distributed.pipelining.schedules")
    per_rank = _stages_per_rank(schedule)
    total = degree * per_rank
    indices = (0, total - 1) if schedule in V_SHAPED else range(0, total, degree)
    stages = [
        SimpleNamespace(
            stage_index=index,
            num_stages=total,
            group_size=degree,
            group_rank=0,
            is_first=index == 0,
            is_last=index == total - 1,
            has_backward=True,
            submod=None,
            device="cpu",
        )
        for index in indices
    ]
    try:
        kind = module.get_schedule_class(schedule)
        kind(stages[0] if per_rank == 1 else stages, n_microbatches=number, loss_fn=lambda: None)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_micro_batches_are_those_that_torch_orders(schedule, degree):
    for number in range(1, 14):
        assert _orders(schedule, number, degree) == accepts(schedule, number, degree), number


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["pipeline_parallel_schedule=interleaved1f1b"],
        ["pipeline_parallel_schedule=ZBVZeroBubble"],
        ["pipeline_parallel_schedule=ZBVZeroBubble", "fsdp_reshard_after_forward=never"],
        ["pipeline_parallel_schedule=InterleavedZeroBubble", "activation_checkpoint.mode=full"],
        ["fsdp_reshard_after_forward=always", "activation_checkpoint.mode=selective"],
        ["pipeline_parallel_layers_per_stage=4"],
        ["pipeline_parallel_schedule=Interleaved1F1B", "pipeline_parallel_layers_per_stage=2"],
        ["pipeline_parallel_microbatch_size=2"],
        ["nitp.no-enable"],
        ["nitp.loss=generic_cosine"],
    ],
    ids=" ".join,
)
def test_accepted(overrides):
    assert problems("pipeline_parallel_degree=2", *overrides) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["pipeline_parallel_schedule=1F1D"], 'found "1F1D", expected one of "1F1B", "GPipe"'),
        (["pipeline_parallel_schedule=1F1D"], 'did you mean "1F1B"?'),
        (["pipeline_parallel_microbatch_size=3"], "found 3, expected a divisor of training.local_batch_size 4"),
        (["training.local_batch_size=1"], "found 1, which makes 1 micro-batches of 1: 1F1B over 2 ranks takes more; "
         "expected at least 2"),
        (["pipeline_parallel_schedule=Interleaved1F1B", "training.local_batch_size=5"], "the nearest: 4 or 6"),
        (["pipeline_parallel_schedule_csv=/nowhere"], 'found "/nowhere", which is no file'),
        (["pipeline_parallel_schedule=DualPipeV"], 'TorchTitan logs no loss; "ZBVZeroBubble" is nearest'),
        (["pipeline_parallel_layers_per_stage=2"], "found 2, which makes 4 stages of 6 layers (and 1 + 1 for the ends),"
         " expected 2 with 1F1B over 2 ranks; 4 would be nearest"),
        (["model.shape.n_layers=1", "pipeline_parallel_schedule=Interleaved1F1B"], "found 2, which makes 4 stages with "
         "Interleaved1F1B: too many for 1 layers (and 1 + 1 for the ends); the largest degree that fits is 1"),
        (["training.no-disable_cuda_graphs", "nitp.geometry_freq=0"], "CUDA graphs and pipelines do not mix"),
        (["pipeline_parallel_schedule=ZBVZeroBubble", "compile.enable"], "ZBVZeroBubble takes the gradients of inputs"),
        (["pipeline_parallel_schedule=ZBVZeroBubble", "fsdp_reshard_after_forward=always"],
         'found "always", expected "default" or "never" with ZBVZeroBubble'),
        (["pipeline_parallel_schedule=InterleavedZeroBubble", "activation_checkpoint.mode=selective"],
         'found "selective", expected "full" or "none" with InterleavedZeroBubble'),
        (["pipeline_parallel_schedule=ZBVZeroBubble", "validator.enable"], "found true, expected false with ZBV"),
        (["model.shape.tie_embeddings=true"], "a model with tied embeddings cannot be pipelined"),
    ],
)  # fmt: skip
def test_refused(overrides, expected):
    found = problems("pipeline_parallel_degree=2", *overrides)
    assert any(expected in problem for problem in found), found


def test_a_stage_without_blocks_is_refused_under_context_parallelism():
    layout = ["model.flavor=debug_moe", "pipeline_parallel_degree=2", "pipeline_parallel_schedule=Interleaved1F1B"]
    assert problems(*layout, ranks=2) == []
    found = problems(*layout, "context_parallel_degree=2", ranks=4)
    assert any("leaves a stage of Interleaved1F1B without blocks" in problem for problem in found), found
    shorter = [f"pipeline_parallel_{end}_stage_less_layers=0" for end in ("first", "last")]
    assert problems(*layout, *shorter, "context_parallel_degree=2", ranks=4) == []


def test_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr("nitp_titan.runtime.machine.torch_version", lambda: (2, 12))
    assert any(
        "pipeline parallelism needs torch >= 2.13, found torch 2.12" in p
        for p in problems("pipeline_parallel_degree=2")
    )
