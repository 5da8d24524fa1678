"""How a job is spread over the ranks, and what that asks of batch and sequence."""

from __future__ import annotations

from dataclasses import dataclass

from nitp_titan.job.draft import Draft, Unknown
from nitp_titan.job.model_facts import ModelFacts
from nitp_titan.runtime import machine

DEGREES = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "context_parallel_degree",
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "expert_parallel_degree",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Degrees of parallelism of a world that they fit."""

    replicate: int
    shard: int
    context: int
    tensor: int
    pipeline: int
    expert: int
    sequence_parallel: bool
    world_size: int

    @classmethod
    def of(cls, draft: Draft) -> Layout:
        """Return the layout of a job.

        Raises:
            Unknown: there is none, which :func:`check_degrees` reports.
        """
        values = [draft.get("parallelism", key) for key in DEGREES]
        replicate, shard, context, tensor, pipeline, expert = values
        others = replicate * context * tensor * pipeline
        if min(*values[:1], *values[2:]) < 1:
            raise Unknown
        if shard == -1:
            shard = draft.world_size // others
        if shard < 1 or shard * others != draft.world_size:
            raise Unknown
        return cls(
            replicate=replicate,
            shard=shard,
            context=context,
            tensor=tensor,
            pipeline=pipeline,
            expert=expert,
            sequence_parallel=draft.get("parallelism", "enable_sequence_parallel"),
            world_size=draft.world_size,
        )

    @property
    def data_parallel(self) -> int:
        """Ranks that read different sequences."""
        return self.replicate * self.shard

    @property
    def sequence_divisor(self) -> int:
        """What the sequence length must be a multiple of."""
        tensor = self.tensor if self.sequence_parallel else 1
        return tensor * (2 * self.context if self.context > 1 else 1)

    def __str__(self) -> str:
        parts = [
            ("replicated", self.replicate),
            ("sharded (FSDP)", self.shard),
            ("context", self.context),
            ("tensor", self.tensor),
            ("pipeline", self.pipeline),
            ("expert", self.expert),
        ]
        shown = ", ".join(f"{name} {degree}" for name, degree in parts if degree > 1)
        ranks = f"{self.world_size} rank" + "s" * (self.world_size > 1)
        return f"{ranks}: {shown}" if shown else ranks


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
