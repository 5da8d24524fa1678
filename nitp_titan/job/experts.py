"""Experts over ranks: which degrees are chosen, and which FSDP and expert parallelism can do."""

from __future__ import annotations

from collections.abc import Iterator

from nitp_titan.job import machine
from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem
from nitp_titan.job.layout import Layout
from nitp_titan.job.models import ModelFacts

NODE = 8
"""GPUs of a node."""


def expert_degree(world_size: int, num_experts: int) -> int:
    """Return the degree of expert parallelism that is chosen for a model; 1 for a dense one."""
    if not num_experts or machine.torch_version() < (2, 13) or _gloo_lacks_all_to_all():
        return 1
    # Within a node: the all-to-all of every block with experts stays on NVLink.
    degrees = range(1, min(world_size, NODE) + 1)
    return max(degree for degree in degrees if world_size % degree == 0 and num_experts % degree == 0)


def _gloo_lacks_all_to_all() -> bool:
    """Whether the exchange of tokens among experts fails on this machine (as ``nitp-titan env`` says)."""
    return machine.torch_version() >= (2, 15) and not machine.has_gpu()


def experts_divide(
    model: ModelFacts, *, replicate: int, shard: int, context: int = 1, tensor: int = 1, expert: int = 1
) -> bool:
    """Whether FSDP can shard a model's experts over these ranks (``apply_fsdp_to_decoder`` in torchtitan).

    Over more ranks than there are experts it cuts each one's weights, and only into equal parts.
    """
    if not model.num_experts or model.expert_hidden_dim is None:
        return True
    if expert > 1:
        cuts, ranks, hidden = shard * context * tensor // expert, shard * context * tensor, model.expert_hidden_dim
    else:
        cuts, ranks, hidden = shard * context, replicate * shard * context, model.expert_hidden_dim // tensor
    return ranks <= model.num_experts or not (hidden % cuts or model.dim % cuts)


def shard_degree(model: ModelFacts, world_size: int, **degrees: int) -> int:
    """Return the largest degree of sharding, the rest being replicas, over which the experts divide; 1 always does."""
    expert = degrees.get("expert", 1)
    return max(
        (
            shard
            for shard in range(1, world_size + 1)
            if world_size % shard == 0
            and shard * degrees.get("context", 1) * degrees.get("tensor", 1) % expert == 0
            and experts_divide(model, replicate=world_size // shard, shard=shard, **degrees)
        ),
        default=1,
    )


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
