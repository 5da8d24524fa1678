"""The bytes that NITP adds to a step, against the formulas of docs/parallelism.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as funcol

from tests.distributed.batches import ROWS, SEQ_LEN
from tests.distributed.layouts import Layout, layout
from tests.distributed.parity import config_of
from tests.distributed.traffic import Traffic
from tests.helpers.ranks import run_on_ranks
from tests.helpers.trainers import running

B, L, D = 2, SEQ_LEN, 128
"""Sequences of a micro-batch, their length, the debug model's width."""

FP32 = 4
PROJECTOR = 3 * 4 * D * D
"""Its parameters."""


def second_step(folder: Path, layout: Layout, start_step: int = 0) -> tuple[dict[str, int], int]:
    """Bytes by operator that this rank sends in a step that is neither the first nor logged; micro-batches in it."""
    config = config_of(folder, layout)
    config.metrics.log_freq = 1000
    config.validator.enable = False
    config.nitp.geometry_freq, config.nitp.start_step = 0, start_step
    with running(config) as trainer:
        batches = trainer.batch_generator(trainer.dataloader)
        trainer.step = 1
        trainer.train_step(batches)
        trainer.step = 2
        with Traffic() as traffic:
            trainer.train_step(batches)
        return traffic.bytes, trainer.gradient_accumulation_steps * trainer.num_pipeline_parallel_microbatches


def added(tmp_path: Path, layout: Layout) -> tuple[list[dict[str, int]], int]:
    """What the NITP term adds to each rank's step, by operator; micro-batches of a step."""
    on = run_on_ranks(layout.ranks, second_step, tmp_path / "on", layout)
    off = run_on_ranks(layout.ranks, second_step, tmp_path / "off", layout, 1000)
    more = []
    for (with_nitp, _), (without, _) in zip(on, off, strict=True):
        difference = {name: with_nitp[name] - without[name] for name in with_nitp | without}
        more.append({name: number for name, number in difference.items() if number})
    return more, on[0][1]


def test_fully_sharded(tmp_path):
    """The gradient of the projector, once a step and micro-batch; its weights, gathered beside the embedding's."""
    more, micro_batches = added(tmp_path, layout("debug", 2, local_batch_size=B))
    assert more == [{"_reduce_scatter_base_": micro_batches * PROJECTOR * FP32}] * 2

    weights = []
    for projector in ("swiglu", "none"):
        plain = layout("debug", 2, local_batch_size=B, nitp={"projector": projector})
        weights.append(run_on_ranks(2, second_step, tmp_path / projector, plain))
    for (with_projector, _), (without, _) in zip(*weights, strict=True):
        gathered = with_projector["_allgather_base_"] - without["_allgather_base_"]
        assert gathered == micro_batches * PROJECTOR // 2 * FP32


@pytest.mark.parametrize("balancer", ["headtail", None])
@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallelism_moves_a_row_per_neighbour(tmp_path, ranks, balancer):
    more, micro_batches = added(tmp_path, layout("debug", ranks, cp=ranks, balancer=balancer, local_batch_size=B))
    # A run's first row goes to whoever holds the row before it: to another rank, unless it is the sequence's first.
    # With the balancer the two runs in the middle of the sequence are one rank's.
    if balancer is None:
        runs = [0] + [1] * (ranks - 1)
    else:
        runs = [1] + [2] * (ranks - 2) + [1]
    row = B * D * FP32
    assert [rank.pop("alltoall_base_", 0) for rank in more] == [micro_batches * n * row for n in runs]
    # The gradient of the projector: context ranks are FSDP ranks too.
    assert all(set(rank) == {"_reduce_scatter_base_"} for rank in more)


def test_sequence_parallelism_moves_a_row_and_shards_the_prediction(tmp_path):
    more, micro_batches = added(tmp_path, layout("debug", 2, tp=2, local_batch_size=B))
    prediction = B * L * D * FP32
    for rank, found in enumerate(more):
        assert found.pop("alltoall_base_", 0) == micro_batches * rank * B * D * FP32
        # Forward: the projector's partial sums are scattered. Backward: their gradient is gathered.
        assert found.pop("reduce_scatter_tensor") == micro_batches * prediction
        assert found.pop("all_gather_into_tensor") == micro_batches * prediction // 2
        assert found.pop("all_reduce") == micro_batches * FP32
        assert not found


def test_tensor_parallelism_without_sequence_parallelism_adds_one_all_reduce(tmp_path):
    more, micro_batches = added(tmp_path, layout("debug", 2, tp=2, sp=False, local_batch_size=B))
    assert more == [{"all_reduce": micro_batches * B * L * D * FP32}] * 2


@pytest.fixture(scope="module")
def pipeline_without_target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    return run_on_ranks(4, second_step, folder, pipeline(loss="generic_cosine"))


def pipeline(**nitp: object) -> Layout:
    return layout("debug", 4, pp=4, schedule="1F1B", local_batch_size=4, nitp=nitp)


@pytest.mark.parametrize(("target_layer", "sending"), [(0, (0, 1, 2)), (2, (1, 2)), (3, (2,)), (5, ())])
def test_pipeline_carries_the_target_no_further_than_it_must(tmp_path, pipeline_without_target, target_layer, sending):
    """Four stages: embeddings and block 1, blocks 2 and 3, blocks 4 and 5, block 6 and the unembedding.

    The target after k blocks is what block k + 1 reads, so it is sent from that block's stage on.
    """
    carried = run_on_ranks(4, second_step, tmp_path, pipeline(target_layer=target_layer))
    more = [
        found["send"] - plain["send"] for (found, _), (plain, _) in zip(carried, pipeline_without_target, strict=True)
    ]
    # Forward alone: the target is a constant.
    assert more == [ROWS * L * D * FP32 if stage in sending else 0 for stage in range(4)]


def test_traffic_counts_what_is_sent():
    sent = run_on_ranks(2, _known_traffic)
    assert sent == [{"all_reduce": 40, "alltoall_base_": 32}] * 2


def _known_traffic() -> dict[str, int]:
    with Traffic() as traffic:
        funcol.all_reduce(torch.ones(10), "sum", dist.group.WORLD)
        received, sent = torch.empty(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
        dist.all_to_all_single(received, sent)
    return dict(traffic.bytes)
