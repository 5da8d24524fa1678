"""The model of every rank of a fake process group against torch's own shards, closed forms and schedules."""

from __future__ import annotations

import gc
import logging
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining.schedules import _Action
from torchtitan.components.loss import CrossEntropyLoss

from nitp_titan.job import JobError, load_job
from nitp_titan.models.registry import model_registry
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.runtime import machine
from nitp_titan.tools.estimate import fake_ranks
from nitp_titan.tools.estimate.fake_ranks import LayoutError, rank_model
from tests.helpers.trainers import trainer_config

EP = pytest.mark.skipif(machine.torch_version() < (2, 13), reason="expert parallelism needs torch >= 2.13")
PP = pytest.mark.skipif(machine.torch_version() < (2, 13), reason="torchtitan's pipelines need torch >= 2.13")
# Sizes that no degree below divides: 331 tokens, 6 heads of width 10, 5 rows a kind left over somewhere.
DENSE: dict[str, Any] = {
    "dim": 60, "n_layers": 2, "n_heads": 6, "n_kv_heads": 6, "head_dim": 10, "hidden_dim": 134, "vocab_size": 331,
}  # fmt: skip
EXPERTS: dict[str, Any] = {**DENSE, "num_experts": 6, "expert_hidden_dim": 24}


def config(flavor: str, shape: dict[str, Any], *, nitp: bool = True, batch: int = 4, **parallelism: Any) -> Any:
    """A run of a small model, in a folder that does not come to be."""
    made = trainer_config(Path("/nowhere/run"), Path("/nowhere/corpus"), nitp=NITPConfig(enable=nitp))
    made.model_spec = model_registry(flavor, **shape)
    made.training.local_batch_size, made.training.global_batch_size = batch, -1
    if not nitp:
        made.loss = CrossEntropyLoss.Config(global_vocab_size=made.model_spec.model.vocab_size)
    for name, value in parallelism.items():
        setattr(made.parallelism, name, value)
    return made


def numel(made: Any, *, projector: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in made.model_spec.model.build().parameters()) + projector


LAYOUTS = {
    "FSDP": ("debug", DENSE, 8, {}),
    "FSDP, tied": ("debug", {**DENSE, "tie_embeddings": True}, 8, {}),
    "HSDP": ("debug", DENSE, 8, {"data_parallel_replicate_degree": 2}),
    "tensor": ("debug", DENSE, 2, {"tensor_parallel_degree": 2}),
    "FSDP, tensor": ("debug", DENSE, 8, {"tensor_parallel_degree": 2}),
    "HSDP, tensor": ("debug", DENSE, 8, {"tensor_parallel_degree": 2, "data_parallel_replicate_degree": 2}),
    "FSDP, whole experts": ("debug_moe", EXPERTS, 4, {}),
    "FSDP, cut experts": ("debug_moe", EXPERTS, 12, {}),
    "FSDP, tensor, experts": ("debug_moe", EXPERTS, 8, {"tensor_parallel_degree": 2}),
    "experts": ("debug_moe", EXPERTS, 2, {"expert_parallel_degree": 2}),
    "FSDP x experts": ("debug_moe", EXPERTS, 6, {"expert_parallel_degree": 2}),
    "FSDP x experts, cut": ("debug_moe", EXPERTS, 8, {"expert_parallel_degree": 2}),
    "FSDP x tensor x experts": ("debug_moe", EXPERTS, 8, {"tensor_parallel_degree": 2, "expert_parallel_degree": 2}),
    "HSDP x experts": (
        "debug_moe", EXPERTS, 8, {"data_parallel_replicate_degree": 2, "expert_parallel_degree": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=EP) if " x experts" in name or name == "experts" else name for name in LAYOUTS]
)
def test_shards_of_every_rank_are_torchs(name):
    flavor, shape, world, degrees = LAYOUTS[name]
    made = config(flavor, shape, **degrees)
    found = rank_model(made, world, world - 1)
    assert found.ranks == range(world)
    for rank in range(world):
        # Played in its turn, each rank is compared with the shards that it really gets.
        assert rank_model(made, world, rank).parameters == found.parameters
    replicas = degrees.get("data_parallel_replicate_degree", 1)
    tensor = degrees.get("tensor_parallel_degree", 1)
    for parameter in found.parameters:
        # What tensor parallelism does not split, it repeats.
        copies = world // math.prod(split.size for split in parameter.splits)
        assert copies in (replicas, replicas * tensor)
        assert sum(parameter.held(rank) for rank in range(world)) == copies * math.prod(parameter.shape)
        assert max(map(parameter.held, range(world))) <= parameter.allocated(0)
    assert sum(math.prod(p.shape) for p in found.parameters) == numel(made, projector=12 * 60**2)


def held(found: fake_ranks.RankModel, name: str, rank: int) -> int:
    [parameter] = [parameter for parameter in found.parameters if parameter.name == name]
    return parameter.held(rank)


def test_fsdp_shards_rows_and_pads_the_last_ones():
    found = rank_model(config("debug", DENSE), 8, 0)
    embedding = "tok_embeddings.weight"  # 331 rows: seven ranks have 42, the last one 37
    assert [held(found, embedding, rank) for rank in (0, 6, 7)] == [42 * 60, 42 * 60, 37 * 60]
    # 60 rows: seven ranks have 8, the last one 4
    assert [held(found, "projector.w2.weight", rank) for rank in (0, 6, 7)] == [8 * 240, 8 * 240, 4 * 240]
    [parameter] = [p for p in found.parameters if p.name == embedding]
    assert [parameter.allocated(rank) for rank in (0, 7)] == [42 * 60, 42 * 60]
    # 60 numbers of a norm over 40 ranks: two each, then none.
    found = rank_model(config("debug", DENSE), 40, 39)
    assert [held(found, "norm.weight", rank) for rank in (0, 29, 30, 39)] == [2, 2, 0, 0]


def test_hsdp_shards_within_a_replica():
    found = rank_model(config("debug", DENSE, data_parallel_replicate_degree=2), 8, 0)
    assert [held(found, "tok_embeddings.weight", rank) for rank in range(8)] == [83 * 60] * 3 + [82 * 60] + [
        83 * 60
    ] * 3 + [82 * 60]


def test_tensor_parallelism_splits_the_projector_as_a_feed_forward():
    found = rank_model(config("debug", DENSE, tensor_parallel_degree=2), 4, 3)
    for rank in range(4):
        # w1, w3 (240 x 60) by rows over both axes; w2 (60 x 240) by columns, then by rows.
        assert held(found, "projector.w1.weight", rank) == held(found, "projector.w3.weight", rank) == 60 * 60
        assert held(found, "projector.w2.weight", rank) == 30 * 120
        assert held(found, "norm.weight", rank) == 30
    # 331 rows are 166 and 165, each halved.
    assert [held(found, "lm_head.weight", rank) // 60 for rank in range(4)] == [83, 83, 83, 82]


@EP
def test_expert_parallelism_shares_the_experts():
    name = "layers.1.moe.routed_experts.inner_experts.w1_EFD"  # (6, 24, 60)
    degrees = {"expert_parallel_degree": 2}
    expert = 24 * 60
    whole = rank_model(config("debug_moe", EXPERTS, **degrees), 4, 3)
    # Three experts a group, of which one rank has two.
    assert [held(whole, name, rank) for rank in range(4)] == [2 * expert, 2 * expert, expert, expert]
    cut = rank_model(config("debug_moe", EXPERTS, **degrees), 8, 7)
    assert {held(cut, name, rank) for rank in range(8)} == {3 * expert // 4}
    with_tensor = rank_model(config("debug_moe", EXPERTS, **degrees, tensor_parallel_degree=2), 4, 3)
    assert [held(with_tensor, name, rank) for rank in range(4)] == [2 * expert, 2 * expert, expert, expert]


@PP
@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_every_stage_of_a_pipeline_is_built(schedule):
    made = config("debug_moe", EXPERTS | {"n_layers": 6}, nitp=False, pipeline_parallel_degree=2,
                  pipeline_parallel_schedule=schedule)  # fmt: skip
    stages = [rank_model(made, 4, rank) for rank in (1, 3)]
    assert [stage.ranks for stage in stages] == [range(2), range(2, 4)]
    assert [stage.micro_batches for stage in stages] == [4, 4]
    assert sorted(block for stage in stages for part in stage.parts for block in part.blocks) == list(range(6))
    assert sum(part.first for stage in stages for part in stage.parts) == 1
    assert sum(part.last for stage in stages for part in stage.parts) == 1
    assert {len(stage.parts) for stage in stages} == {1 if schedule == "1F1B" else 2}
    # The V comes back to where it started.
    ends = stages[0 if schedule == "ZBVZeroBubble" else 1]
    assert any(part.last for part in ends.parts)
    assert stages[0].parts[0].first
    total = sum(p.held(rank) for stage in stages for p in stage.parameters for rank in stage.ranks)
    assert total == numel(made, projector=0)


def in_flight(degree: int, schedule: str, batch: int, layers: int = 8) -> list[list[int]]:
    """Of each place in the pipeline, and each part of the model there."""
    made = config("debug", DENSE | {"n_layers": layers}, nitp=False, batch=batch, pipeline_parallel_degree=degree,
                  pipeline_parallel_schedule=schedule)  # fmt: skip
    return [[part.in_flight for part in rank_model(made, degree, rank).parts] for rank in range(degree)]


@PP
def test_micro_batches_in_flight_are_the_schedules():
    # A stage of 1F1B has as many as there are stages from it to the end; GPipe's have all.
    assert in_flight(4, "1F1B", 8) == [[4], [3], [2], [1]]
    assert in_flight(4, "1F1B", 4) == [[4], [3], [2], [1]]
    assert in_flight(4, "GPipe", 8) == [[8]] * 4
    # Interleaved: 2 (stages to the end) + (parts - 1) stages warm up, and one more goes forward.
    assert [sum(parts) for parts in in_flight(4, "Interleaved1F1B", 8)] == [2 * (3 - rank) + 4 + 1 for rank in range(4)]
    # The zero-bubble V keeps as much as 1F1B's first stage, 2 x stages parts of half a stage, everywhere.
    assert [sum(parts) for parts in in_flight(4, "ZBVZeroBubble", 16)] == [8] * 4


def test_activations_are_kept_until_the_weights_gradients_are_there():
    def peaks(*words: str, blocks: tuple[int, ...]) -> list[int]:
        # "0F1" is stage 0's forward pass of micro-batch 1.
        schedule = SimpleNamespace(pipeline_order={3: [None, *map(_Action.from_str, words)]})
        return fake_ranks._in_flight(schedule, 3, [SimpleNamespace(layers=range(number)) for number in blocks])

    assert peaks("0F0", "0F1", "0B0", "0F2", "0B1", "0B2", blocks=(1,)) == [2]
    # The input's gradients of two are there before the weights' of the first.
    assert peaks("0F0", "0F1", "0I0", "0F2", "0W0", "0I1", "0I2", "0W1", "0W2", blocks=(1,)) == [3]
    # Of two parts, the moment at which most blocks are kept; a part of the unembedding alone counts as a block.
    order = ("1F0", "5F0", "1F1", "5B0", "1F2", "1B0", "1B1", "1B2")
    assert peaks(*order, blocks=(2, 1)) == [3, 0]
    assert peaks(*order, blocks=(1, 2)) == [2, 1]
    assert peaks("1F0", "1B0", "5F0", "5F1", "5B0", "5B1", blocks=(1, 0)) == [0, 2]


def test_what_torch_refuses_is_a_layout_error():
    with pytest.raises(LayoutError, match=r"uneven sharding on dim 1: torch.Size\(\[6, 24, 60\]\) \(world size: 10\)"):
        rank_model(config("debug_moe", EXPERTS), 10, 0)
    with pytest.raises(LayoutError, match=r"Invalid parallel dims"):
        rank_model(config("debug", DENSE, tensor_parallel_degree=3), 8, 0)
    with pytest.raises(LayoutError, match="Number of stages"):
        rank_model(config("debug", DENSE, nitp=False, pipeline_parallel_degree=8), 8, 0)


def test_nothing_is_allocated_and_the_process_is_left_as_it_was(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    trainers = []
    described = fake_ranks._described
    monkeypatch.setattr(fake_ranks, "_described", lambda *args: trainers.append(args[0]) or described(*args))
    # Trainers of other tests in this process have switched it off.
    gc.enable()
    torch.manual_seed(12345)
    before, environment = torch.random.get_rng_state(), dict(os.environ)
    made = config("debug", DENSE, nitp=False, tensor_parallel_degree=2)
    made.dump_folder = "run"
    configured = repr(made)
    rank_model(made, 4, 0)
    assert repr(made) == configured
    with pytest.raises(LayoutError):
        rank_model(config("debug", DENSE, tensor_parallel_degree=3), 4, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    # Alone, TorchTitan draws from torch's own generator.
    rank_model(config("debug", DENSE), 1, 0)
    trainer, _ = trainers
    assert all(tensor.is_meta for module in trainer.model_parts for tensor in (*module.parameters(), *module.buffers()))
    assert not hasattr(trainer, "optimizers")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert dict(os.environ) == environment
    assert gc.isenabled()
    assert not logging.root.manager.disable
    assert not torch.distributed.is_initialized()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("expert_hidden_dim", [24, 64])
@pytest.mark.parametrize(
    ("world", "degrees"),
    [
        (6, {}),
        (8, {}),
        (12, {"data_parallel_replicate_degree": 2}),
        (16, {"data_parallel_replicate_degree": 2}),
        (16, {"tensor_parallel_degree": 2}),
        pytest.param(6, {"expert_parallel_degree": 2}, marks=EP),
        pytest.param(8, {"expert_parallel_degree": 2}, marks=EP),
        pytest.param(12, {"expert_parallel_degree": 2, "tensor_parallel_degree": 2}, marks=EP),
        pytest.param(24, {"expert_parallel_degree": 2, "data_parallel_replicate_degree": 2}, marks=EP),
    ],
    ids=str,
)
def test_a_job_is_refused_where_torch_cannot_cut_its_experts(world, degrees, expert_hidden_dim):
    shape = {
        "num_experts": 4,
        "top_k": 2,
        "dim": 64,
        "head_dim": 16,
        "expert_hidden_dim": expert_hidden_dim,
        "n_layers": 2,
    }
    refusal = ""
    try:
        rank_model(config("debug_moe", shape, **degrees), world, 0)
    except LayoutError as error:
        refusal = str(error)
    refused = "uneven sharding" in refusal
    assert refused or not refusal
    words = ["--model.flavor=debug_moe", "--training.local_batch_size=1", "--training.global_batch_size=-1"]
    words += [f"--dataloader.num_streams={world}", *(f"--model.shape.{key}={value}" for key, value in shape.items())]
    words += [f"--parallelism.{key}={value}" for key, value in ({"expert_parallel_degree": 1} | degrees).items()]
    try:
        load_job(None, words, world, for_training=False)
        found = ""
    except JobError as error:
        found = str(error)
    assert ("expected equal parts" in found, found == "") == (refused, not refused), found
