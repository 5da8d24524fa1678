"""The shapes of the model family and the job defaults that each brings along.

Free of torch, so that a job file is checked without the seconds that importing torch takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(kw_only=True, frozen=True, slots=True)
class Shape:
    """Shape of one decoder: grouped-query attention, SwiGLU, RMSNorm, rotary positions; dense or mixture of experts.

    What the paper leaves open has a default with its reason, and ``[model.shape]`` of a job changes any of it.
    """

    dim: int
    """Width of the residual stream."""

    n_layers: int
    """Number of blocks."""

    n_heads: int
    """Query heads."""

    n_kv_heads: int
    """Key-value heads."""

    head_dim: int
    """Width of a head."""

    hidden_dim: int
    """Width of a dense feed-forward."""

    vocab_size: int
    """Rows of the embedding."""

    max_seq_len: int
    """Longest sequence that the rotary positions cover."""

    rope_theta: float = 10_000.0
    """Base of the rotary frequencies. Open in the paper: DeepSeek-V2's and Llama 2's, which serve a context of 8192."""

    norm_eps: float = 1e-6
    """Epsilon of RMSNorm. Open in the paper: Qwen2's."""

    init_std: float = 0.02
    """Standard deviation of initial weights, over sqrt(2 n_layers) where a block writes to the residual stream."""

    tie_embeddings: bool = False
    """One matrix for embedding and unembedding. Open in the paper: its parameter counts fit tied dense models and
    untied mixtures of experts."""

    num_experts: int = 0
    """Routed experts of a block; 0 makes every block dense."""

    top_k: int = 0
    """Experts that a token is routed to."""

    expert_hidden_dim: int = 0
    """Width of an expert, and of a shared one."""

    num_shared_experts: int = 0
    """Experts that see every token."""

    n_dense_layers: int = 0
    """Blocks at the bottom of a mixture of experts that keep a dense feed-forward."""

    router_score_func: Literal["softmax", "sigmoid"] = "softmax"
    """Scores of the router. Open in the paper: softmax, which stock transformers (Ernie 4.5) can load."""

    router_norm: bool = True
    """Whether the weights of the chosen experts add up to 1. Open in the paper: as Ernie 4.5 does."""

    load_balance_coeff: float = 1e-3
    """Step of the selection bias that balances loads without an auxiliary loss (arXiv 2408.15664). Open in the paper:
    TorchTitan's value."""

    def moe_layers(self) -> int:
        """Number of blocks with routed experts."""
        return self.n_layers - self.n_dense_layers if self.num_experts else 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) for every value that contradicts itself or another."""
        optional = {"num_experts", "num_shared_experts", "n_dense_layers"}
        if not self.num_experts:
            optional |= {"top_k", "expert_hidden_dim", "load_balance_coeff"}
        numbers = {f.name: getattr(self, f.name) for f in fields(self)}
        numbers = {name: value for name, value in numbers.items() if not isinstance(value, bool | str)}
        wrong = [name for name, value in numbers.items() if not (value >= 0 if name in optional else value > 0)]
        for name in wrong:
            whole = "at least 0" if name in optional else "at least 1"
            expected = whole if isinstance(numbers[name], int) else "a positive number"
            yield name, f"found {numbers[name]}, expected {expected}"
        if wrong:
            return
        if self.n_heads % self.n_kv_heads:
            yield "n_kv_heads", f"found {self.n_kv_heads}, expected a divisor of n_heads {self.n_heads}"
        if self.head_dim % 2:
            yield "head_dim", f"found {self.head_dim}, expected an even number: rotary positions turn pairs"
        if self.num_experts:
            # Ernie 4.5, what a mixture of experts is exported to, derives one from the other.
            if self.head_dim * self.n_heads != self.dim:
                found = f"{self.head_dim} x n_heads {self.n_heads} = {self.head_dim * self.n_heads}"
                yield "head_dim", f"found {found}, expected dim {self.dim} in a mixture of experts"
            if self.top_k > self.num_experts:
                yield "top_k", f"found {self.top_k}, expected at most num_experts {self.num_experts}"
            if self.n_dense_layers >= self.n_layers:
                yield "n_dense_layers", f"found {self.n_dense_layers}, expected fewer than n_layers {self.n_layers}"
        else:
            for name in ("top_k", "expert_hidden_dim", "num_shared_experts", "n_dense_layers"):
                if getattr(self, name):
                    yield name, f"found {getattr(self, name)}, expected 0 without routed experts (num_experts = 0)"


@dataclass(kw_only=True, frozen=True, slots=True)
class Flavor:
    """A shape and the job that goes with it."""

    shape: Shape
    job_defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Table -> key -> value of a job that names this flavor; a job file and the command line override them."""


CONTEXT = 8192
QWEN2_VOCABULARY = 152_064
"""The paper's vocabulary (appendix G): Qwen2's 151,646 tokens, padded."""


def _paper_job(
    *,
    target_layer: int,
    weight: float,
    lr: float,
    global_batch: int,
    local_batch: int,
    tokens: float,
    decay: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """The paper's training of a model (table 4): 2000 warm-up steps, then constant, the last fifth decaying.

    Args:
        global_batch: sequences of a step.
        local_batch: sequences of a micro-batch and rank; ours, to fit 80 GB.
        tokens: budget of the run; it gives the number of steps.
    """
    return {
        "nitp": {"target_layer": target_layer, "weight": weight},
        "training": {
            "seq_len": CONTEXT,
            "global_batch_size": global_batch,
            "local_batch_size": local_batch,
            "steps": round(tokens / (global_batch * CONTEXT)),
            "max_norm": 1.0,
        },
        "optimizer": {"name": "AdamW", "lr": lr, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1},
        # The curve of the decay is open in the paper but for the 45B model: linear, TorchTitan's.
        "lr_scheduler": {"warmup_steps": 2000, "decay_ratio": 0.2, **(decay or {"decay_type": "linear"})},
        "model": {"hf_assets_path": "assets/Qwen2-0.5B"},
        "tokenizer": {"name": "huggingface"},
        # The paper's corpus is not public: TorchTitan's default one takes its place, in streams for up to 256 ranks.
        "dataloader": {"dataset": "c4", "num_streams": 256},
    }


def _dense(**shape: Any) -> Shape:
    return Shape(vocab_size=QWEN2_VOCABULARY, max_seq_len=CONTEXT, tie_embeddings=True, **shape)


def _moe(**shape: Any) -> Shape:
    return Shape(
        vocab_size=QWEN2_VOCABULARY,
        max_seq_len=CONTEXT,
        num_experts=144,
        num_shared_experts=1,
        n_dense_layers=1,
        **shape,
    )


_DEBUG_JOB: dict[str, dict[str, Any]] = {
    "tokenizer": {"name": "byte"},
    "dataloader": {"dataset": "python_stdlib"},
    "training": {"local_batch_size": 8, "seq_len": 256, "steps": 200},
    "optimizer": {"lr": 2e-3},
    "lr_scheduler": {"warmup_steps": 20, "decay_ratio": 0.2},
    "activation_checkpoint": {"mode": "none"},
}

# Run on a CPU core or two. The vocabulary covers the built-in byte tokenizer, rounded up to a multiple of 64.
_DEBUG = {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "hidden_dim": 384, "vocab_size": 320}

FLAVORS: dict[str, Flavor] = {
    "debug": Flavor(shape=Shape(**_DEBUG, n_layers=6, max_seq_len=CONTEXT), job_defaults=_DEBUG_JOB),
    "debug_moe": Flavor(
        shape=Shape(
            **_DEBUG,
            n_layers=4,
            max_seq_len=CONTEXT,
            num_experts=8,
            top_k=2,
            expert_hidden_dim=128,
            num_shared_experts=1,
            n_dense_layers=1,
        ),
        job_defaults=_DEBUG_JOB,
    ),
    # The paper's table 4.
    "0.5B": Flavor(
        shape=_dense(dim=896, n_layers=24, n_heads=14, n_kv_heads=2, head_dim=64, hidden_dim=4864),
        job_defaults=_paper_job(target_layer=5, weight=1.0, lr=4.2e-4, global_batch=512, local_batch=8, tokens=200e9),
    ),
    "2B": Flavor(
        shape=_dense(dim=1792, n_layers=28, n_heads=14, n_kv_heads=2, head_dim=128, hidden_dim=10752),
        job_defaults=_paper_job(target_layer=6, weight=1.0, lr=4.2e-4, global_batch=1024, local_batch=4, tokens=330e9),
    ),
    "3B": Flavor(
        shape=_dense(dim=2560, n_layers=28, n_heads=20, n_kv_heads=4, head_dim=128, hidden_dim=10240),
        job_defaults=_paper_job(target_layer=6, weight=0.8, lr=4.2e-4, global_batch=1024, local_batch=2, tokens=330e9),
    ),
    "1.9B-A0.3B": Flavor(
        shape=_moe(
            dim=512, n_layers=16, n_heads=8, n_kv_heads=4, head_dim=64, hidden_dim=10944, top_k=8, expert_hidden_dim=496
        ),
        job_defaults=_paper_job(target_layer=3, weight=1.0, lr=6.0e-4, global_batch=256, local_batch=8, tokens=105e9),
    ),
    "3B-A0.5B": Flavor(
        shape=_moe(
            dim=768, n_layers=17, n_heads=8, n_kv_heads=4, head_dim=96, hidden_dim=10944, top_k=8, expert_hidden_dim=544
        ),
        job_defaults=_paper_job(target_layer=4, weight=1.0, lr=8.7e-4, global_batch=512, local_batch=4, tokens=200e9),
    ),
    "9B-A1B": Flavor(
        shape=_moe(
            dim=1280,
            n_layers=24,
            n_heads=8,
            n_kv_heads=4,
            head_dim=160,
            hidden_dim=10944,
            top_k=8,
            expert_hidden_dim=640,
        ),
        job_defaults=_paper_job(target_layer=5, weight=0.8, lr=4.2e-4, global_batch=1024, local_batch=2, tokens=330e9),
    ),
    "45B-A5.5B": Flavor(
        # The paper says 24 layers in all; its counts fit one dense and 23 with experts.
        shape=_moe(
            dim=3072,
            n_layers=24,
            n_heads=24,
            n_kv_heads=8,
            head_dim=128,
            hidden_dim=12288,
            top_k=12,
            expert_hidden_dim=1408,
        ),
        job_defaults=_paper_job(
            target_layer=5,
            weight=0.6,
            lr=2.8e-4,
            global_batch=768,
            local_batch=1,
            tokens=240e9,
            # "An exponential-decay WSD variant": to a tenth, which is open in the paper.
            decay={"decay_type": "exponential", "min_lr_factor": 0.1},
        ),
    ),
}
