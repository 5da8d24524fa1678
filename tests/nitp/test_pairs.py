"""Which positions count, whole and cut for a context rank."""

from __future__ import annotations

import pytest
import torch
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims

from nitp_titan.nitp.config import NITPConfig
from nitp_titan.nitp.pairs import counted
from nitp_titan.nitp.sequence_shards import runs_of_ranks
from nitp_titan.titan.context import context_shard
from tests.distributed.batches import SEQ_LEN, global_batch
from tests.helpers.ranks import run_on_ranks


def test_without_positions_a_row_is_one_document():
    labels = torch.tensor([[1, 2, -100, 4]])
    assert counted(NITPConfig(), None, labels).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("nitp", [NITPConfig(shift=0), NITPConfig(loss="generic_cosine")], ids=["shift 0", "generic"])
def test_without_a_shift_every_valid_label_counts(nitp):
    _, positions, labels = global_batch(0, 300)
    assert torch.equal(counted(nitp, positions, labels), labels != -100)


def shard(balancer: str | None) -> torch.Tensor:
    parallelism = ParallelismConfig(
        context_parallel_degree=2, context_parallel_load_balancer=balancer, spmd_backend="partial_dtensor"
    )
    dims = ParallelDims.from_config(parallelism, 2)
    _, positions, labels = global_batch(0, 300)
    return context_shard(counted(NITPConfig(), positions, labels), dims, parallelism)


@pytest.mark.parametrize("balancer", ["headtail", None])
def test_a_context_rank_has_the_masks_columns_of_its_tokens(balancer):
    _, positions, labels = global_batch(0, 300)
    whole = counted(NITPConfig(), positions, labels)
    held = runs_of_ranks(SEQ_LEN, context=2, tensor=1, head_tail=balancer is not None)
    for runs, found in zip(held, run_on_ranks(2, shard, balancer), strict=True):
        assert torch.equal(found, whole[:, [p for run in runs for p in run]])
