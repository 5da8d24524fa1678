"""The shapes of the model family and the job defaults that each brings along.

Free of torch, so that a job file is checked without the seconds that importing torch takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True, frozen=True, slots=True)
class MoEShape:
    """Routed and shared experts of the blocks that have them."""

    num_experts: int
    top_k: int
    expert_hidden_dim: int
    num_shared_experts: int = 1
    n_dense_layers: int = 1
    """How many blocks at the bottom keep a dense feed-forward."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Flavor:
    """Shape of one decoder: grouped-query attention, SwiGLU, RMSNorm, rotary positions."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    """Width of a dense feed-forward."""
    vocab_size: int
    max_seq_len: int
    rope_theta: float = 10_000.0
    tie_embeddings: bool = False
    moe: MoEShape | None = None
    job_defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Table -> key -> value of a job that names this flavor; a job file and the command line override them."""


_DEBUG_JOB: dict[str, dict[str, Any]] = {
    "tokenizer": {"name": "byte"},
    "dataloader": {"dataset": "python_stdlib"},
    "training": {"local_batch_size": 8, "seq_len": 256, "steps": 200},
    "optimizer": {"lr": 2e-3},
    "lr_scheduler": {"warmup_steps": 20, "decay_ratio": 0.2},
}

# Both run on a CPU core or two. The vocabulary covers the built-in byte tokenizer, rounded up to a multiple of 64.
FLAVORS: dict[str, Flavor] = {
    "debug": Flavor(
        dim=128,
        n_layers=6,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        hidden_dim=384,
        vocab_size=320,
        max_seq_len=8192,
        job_defaults=_DEBUG_JOB,
    ),
    "debug_moe": Flavor(
        dim=128,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        hidden_dim=384,
        vocab_size=320,
        max_seq_len=8192,
        moe=MoEShape(num_experts=8, top_k=2, expert_hidden_dim=128),
        job_defaults=_DEBUG_JOB,
    ),
}
