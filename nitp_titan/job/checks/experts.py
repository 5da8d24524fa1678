"""Experts over ranks: which degrees are chosen, and which FSDP and expert parallelism can do."""

from __future__ import annotations

from collections.abc import Iterator

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem
from nitp_titan.job.layout import Layout, _gloo_lacks_all_to_all, experts_divide, shard_degree


def check_expert_shards(draft: Draft) -> Iterator[Problem]:
    """The experts divide over FSDP's ranks."""
    model, layout = draft.facts(), Layout.of(draft)
    degrees = {"context": layout.context, "tensor": layout.tensor, "expert": layout.expert}
    if experts_divide(model, replicate=layout.replicate, shard=layout.shard, **degrees):
        return
    nearest = shard_degree(model, layout.data_parallel, **degrees)
    yield draft.problem(
        "parallelism",
        ("data_parallel_shard_degree", "expert_parallel_degree"),
        f"found {layout.shard} with expert_parallel_degree {layout.expert}, expected equal parts: on more ranks than "
        f"the {model.num_experts} experts FSDP cuts their {model.expert_hidden_dim} x {model.dim} weights",
        f"data_parallel_shard_degree = {nearest} with data_parallel_replicate_degree = "
        f"{layout.data_parallel // nearest} would be nearest",
    )


def check_sequence_parallel(draft: Draft) -> Iterator[Problem]:
    """Experts that exchange tokens leave each tensor-parallel rank a part of the sequence: blocks must take it."""
    model, layout = draft.facts(), Layout.of(draft)
    if model.num_experts and layout.expert > 1 and layout.tensor > 1 and not layout.sequence_parallel:
        yield draft.problem(
            "parallelism",
            "enable_sequence_parallel",
            f"found false, expected true with expert_parallel_degree {layout.expert} and tensor_parallel_degree "
            f"{layout.tensor}: TorchTitan's experts return parts of the sequence",
            "or set expert_parallel_degree = 1",
        )


def check_exchange(draft: Draft) -> Iterator[Problem]:
    """Expert parallelism needs an all-to-all that works on this machine."""
    if draft.get("parallelism", "expert_parallel_degree") > 1 and _gloo_lacks_all_to_all():
        yield draft.problem(
            "parallelism",
            "expert_parallel_degree",
            "found no GPU and torch >= 2.15, with which gloo's all-to-all fails, expected 1",
            "torch 2.13 and 2.14 can on a CPU",
        )


CHECKS = (check_expert_shards, check_sequence_parallel)
