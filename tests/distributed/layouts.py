"""The layouts that must train as one process does. A new one is a line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from nitp_titan.job.checks.pipeline import V_SHAPED
from tests.distributed.batches import ROWS, SEQ_LEN

SHORT = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "balancer": "context_parallel_load_balancer",
    "tp": "tensor_parallel_degree",
    "sp": "enable_sequence_parallel",
    "pp": "pipeline_parallel_degree",
    "schedule": "pipeline_parallel_schedule",
    "micro": "pipeline_parallel_microbatch_size",
    "ep": "expert_parallel_degree",
    "reshard": "fsdp_reshard_after_forward",
}
"""Fields of TorchTitan's ``ParallelismConfig``, as the table writes them."""

OPTIONS = ("ac", "compile", "implementation", "chunk")
"""Fields of :class:`Layout` that a row of the table may name."""


@dataclass(frozen=True)
class Layout:
    """A model, a number of ranks and what differs from plain FSDP on them."""

    model: str
    ranks: int
    parallelism: dict[str, Any] = field(default_factory=dict)
    nitp: dict[str, Any] = field(default_factory=dict)
    batch: int | None = None
    """Sequences of a local batch; by default all of them at once, and half of them in a pipeline."""

    ac: str | None = None
    """Activation checkpointing: "full" or "selective"."""

    compile: str | None = None
    """Backend of torch.compile for blocks, projector and losses."""

    implementation: str | None = None
    """Of the losses, where it is not "fast"."""

    chunk: int | None = None
    """Tokens of a chunk of the losses; by default so few that each loss is taken in two chunks."""

    @property
    def local_batch_size(self) -> int:
        rows = ROWS // self.data_parallel_degree
        return self.batch or max(rows // 2, 2) if "pp" in self.parallelism else self.batch or rows

    @property
    def chunk_tokens(self) -> int:
        if self.chunk:
            return self.chunk
        sequences = self.parallelism.get("micro", 1) if "pp" in self.parallelism else self.local_batch_size
        return sequences * SEQ_LEN // self.parallelism.get("cp", 1) // 2

    @property
    def data_parallel_degree(self) -> int:
        degrees = (self.parallelism.get(name, 1) for name in ("cp", "tp", "pp"))
        return self.ranks // math.prod(degrees)

    @property
    def validates(self) -> bool:
        return self.parallelism.get("schedule") not in V_SHAPED

    def __str__(self) -> str:
        given = {**self.parallelism, **self.nitp}
        given |= {"local": self.batch} if self.batch else {}
        given |= {name: value for name in OPTIONS if (value := getattr(self, name))}
        return "-".join([self.model, f"{self.ranks}ranks", *(f"{name}={value}" for name, value in given.items())])


def layout(model: str, ranks: int, *, nitp: dict[str, Any] | None = None, **options: Any) -> Layout:
    own = {name: options.pop(name) for name in OPTIONS if name in options}
    own["batch"] = options.pop("local_batch_size", None)
    return Layout(model, ranks, options, nitp or {}, **own)


ZERO_BUBBLE = "InterleavedZeroBubble"
FIRST = {"target_layer": 0}
LAST = {"target_layer": 6}
MOE_LAST = {"target_layer": 4}

LAYOUTS = [
    # The dense debug model: 6 blocks, target after the first.
    layout("debug", 2),
    layout("debug", 2, local_batch_size=1, ac="full", implementation="reference"),
    layout("debug", 2, replicate=2, shard=1),
    layout("debug", 4, replicate=2),
    layout("debug", 2, tp=2, local_batch_size=2),
    layout("debug", 2, tp=2, sp=False),
    layout("debug", 4, tp=2, ac="selective"),
    layout("debug", 2, tp=2, nitp=FIRST),
    layout("debug", 2, tp=2, nitp={"projector": "none", "target_layer": 6}),
    layout("debug", 2, tp=2, nitp={"stop_gradient": False}),
    layout("debug", 2, tp=2, nitp={"shift": 0}),
    layout("debug", 2, tp=2, implementation="reference"),
    layout("debug", 2, tp=2, nitp={"loss": "generic_cosine"}),
    layout("debug", 2, cp=2, local_batch_size=2),
    layout("debug", 2, cp=2, balancer=None),
    layout("debug", 2, cp=2, nitp={"stop_gradient": False}),
    layout("debug", 4, cp=4),
    layout("debug", 4, cp=2, tp=2),
    layout("debug", 4, cp=2, tp=2, sp=False, balancer=None),
    layout("debug", 4, cp=2, nitp={"shift": 0}),
    layout("debug", 4, cp=2, tp=2, nitp={"stop_gradient": False}),
    layout("debug", 8, cp=2, tp=2, ac="full"),
    layout("debug", 8, cp=4, tp=2, balancer=None),
    layout("debug", 2, pp=2, schedule="1F1B", local_batch_size=2),
    layout("debug", 2, pp=2, schedule="1F1B", local_batch_size=8, nitp=FIRST),
    layout("debug", 2, pp=2, schedule="1F1B", nitp=LAST),
    layout("debug", 2, pp=2, schedule="1F1B", nitp={"stop_gradient": False}),
    layout("debug", 2, pp=2, schedule="Interleaved1F1B"),
    layout("debug", 2, pp=2, schedule=ZERO_BUBBLE, local_batch_size=4),
    layout("debug", 2, pp=2, schedule="ZBVZeroBubble", local_batch_size=4),
    layout("debug", 2, pp=2, schedule="GPipe"),
    layout("debug", 2, pp=2, schedule="LoopedBFS"),
    layout("debug", 4, pp=4, schedule="1F1B", local_batch_size=4),
    layout("debug", 4, pp=2, schedule="1F1B"),
    layout("debug", 4, pp=2, tp=2, schedule="1F1B"),
    layout("debug", 4, pp=2, cp=2, schedule="Interleaved1F1B"),
    layout("debug", 4, pp=2, cp=2, schedule="1F1B", nitp={"stop_gradient": False}),
    layout("debug", 8, pp=2, tp=2, schedule="Interleaved1F1B", ac="selective"),
    layout("debug", 8, pp=2, cp=2, tp=2, schedule="1F1B", nitp=FIRST),
    layout("debug", 2, compile="aot_eager"),
    layout("debug", 4, cp=2, tp=2, compile="aot_eager"),
    layout("debug", 2, pp=2, schedule="Interleaved1F1B", compile="aot_eager"),
    # Our MoE: a dense block and three of 8 experts.
    layout("debug_moe", 2),
    layout("debug_moe", 2, reshard="always", ac="full"),
    layout("debug_moe", 2, tp=2, local_batch_size=1),
    layout("debug_moe", 4, pp=2, tp=2, schedule="1F1B"),
    layout("debug_moe", 2, ep=2, local_batch_size=2),
    layout("debug_moe", 2, ep=2, tp=2),
    layout("debug_moe", 2, cp=2, ep=2),
    layout("debug_moe", 4, ep=2),
    layout("debug_moe", 4, ep=4, ac="selective"),
    layout("debug_moe", 4, ep=2, tp=2),
    layout("debug_moe", 4, replicate=2, ep=2),
    layout("debug_moe", 2, pp=2, schedule="1F1B", nitp=MOE_LAST),
    layout("debug_moe", 4, pp=2, ep=2, schedule="1F1B"),
    layout("debug_moe", 4, pp=2, ep=2, schedule="Interleaved1F1B", local_batch_size=4),
    layout("debug_moe", 4, ep=2, tp=2, compile="aot_eager"),
    layout("debug_moe", 8, ep=4, tp=2),
    layout("debug_moe", 8, pp=2, ep=4, tp=2, schedule="1F1B"),
    layout("debug_moe", 8, pp=2, ep=2, cp=2, schedule="1F1B"),
    # TorchTitan's own models; its experts compute in bfloat16.
    layout("llama3", 4, cp=2, tp=2),
    layout("llama3", 2, pp=2, schedule="1F1B"),
    layout("qwen3_moe", 2, ep=2),
    layout("qwen3_moe", 2, tp=2, ep=2),
    layout("deepseek_v3", 4, pp=2, ep=2, schedule="1F1B"),
]
