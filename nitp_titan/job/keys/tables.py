"""The tables that are ours: ``[job] [model]``, and flat ones where upstream has unions or lists of objects.

``[nitp]`` is :class:`nitp_titan.nitp.config.NITPConfig`, ``[float8]`` is :mod:`nitp_titan.float8.config`'s,
``[faults]`` :mod:`nitp_titan.training.faults_config`'s; every other
table is upstream's (``upstream_schema.json``).
Free of torch. A docstring under a key is what ``nitp-titan check --keys`` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nitp_titan.nitp.config import CHUNK_TOKENS


@dataclass(kw_only=True, slots=True)
class JobTable:
    """``[job]``: the run as a whole."""

    description: str = ""
    """What the run is for; kept in the resolved file."""

    dump_folder: str = "outputs"
    """Folder of the run: resolved job file, metrics, TensorBoard events, checkpoints."""


@dataclass(kw_only=True, slots=True)
class ModelTable:
    """``[model]``: which decoder is trained."""

    module: str = "nitp_titan"
    """"nitp_titan", a TorchTitan decoder (llama3, qwen3, deepseek_v3, ...), or a dotted path to a module that has
    ``model_registry``."""

    flavor: str = "debug"
    """Which of the module's models."""

    hf_assets_path: str = ""
    """Folder with the tokenizer.json (and weights) in Hugging Face format."""

    attn_backend: Literal["flex", "flex_flash", "varlen"] = "flex"
    """Attention kernel. All three keep documents apart."""


@dataclass(kw_only=True, slots=True)
class TokenizerTable:
    """``[tokenizer]``."""

    name: Literal["huggingface", "byte"] = "huggingface"
    """"huggingface" reads model.hf_assets_path; "byte" is built in and needs no download."""

    eos_token: str | None = None
    """Token that ends a document, such as "<|endoftext|>". Unset: the one that the tokenizer's files name."""

    bos_token: str | None = None
    """Token that begins a document. Unset: the one that the tokenizer's files name."""

    add_eos: bool | None = None
    """Whether documents get the end token. Unset: where there is one."""

    add_bos: bool | None = None
    """Whether documents get the begin token. Unset: where there is one."""

    allow_special_in_text: bool = False
    """Text in a document that reads as a special token becomes that token; if not, it is plain text."""


@dataclass(kw_only=True, slots=True)
class OptimizerTable:
    """``[optimizer]``: one optimizer for all parameters."""

    name: Literal["AdamW", "Adam"] = "AdamW"
    """Optimizer."""

    lr: float = 8e-4
    """Peak learning rate."""

    beta1: float = 0.9
    """Decay of the first moment."""

    beta2: float = 0.95
    """Decay of the second moment."""

    eps: float = 1e-8
    """Added to the denominator."""

    weight_decay: float = 0.1
    """Decoupled weight decay."""

    implementation: Literal["for-loop", "foreach", "fused", "fused_opt_states_bf16"] = "fused"
    """How an update is computed. Unset: "fused" on a GPU, "foreach" without one."""


@dataclass(kw_only=True, slots=True)
class ActivationCheckpointTable:
    """``[activation_checkpoint]``: what the backward pass recomputes."""

    mode: Literal["none", "selective", "full", "memory_budget"] = "selective"
    """"selective" keeps every second matrix product, "full" only block inputs, "memory_budget" lets the compiler
    choose. Unset: "none" for debug flavors."""

    preserve_rng_state: bool = True
    """Stash and restore the random state at each checkpoint."""

    determinism_check: str = "default"
    """torch.utils.checkpoint's check of the recomputed tensors: "default" or "none"."""

    debug: bool = False
    """Record operators, for the message of a failed recomputation; slow."""

    force_recompute_mm_shapes_by_fqns: list[str] = field(default_factory=lambda: ["moe.router.gate"])
    """"selective": products with these linears' shapes are always recomputed."""

    memory_budget: float = 0.5
    """"memory_budget": 0 = as little memory as "full", 1 = as fast as without checkpointing."""

    visualize_memory_budget_pareto: bool = False
    """"memory_budget": draw memory against time for every budget."""


@dataclass(kw_only=True, slots=True)
class LossTable:
    """``[loss]``: the next-token loss (NITP's own is ``nitp.loss``), and how both are computed."""

    name: Literal["auto", "linear_cross_entropy", "chunked_cross_entropy", "cross_entropy"] = "auto"
    """"linear_cross_entropy" is ours and the one that NITP trains with; the others are TorchTitan's.
    "auto": ours with NITP, otherwise chunked_cross_entropy, or cross_entropy on torch < 2.13."""

    chunk_tokens: int = CHUNK_TOKENS
    """"linear_cross_entropy": tokens whose logits are held at a time; NITP's projector takes as many as need
    no more memory."""

    implementation: Literal["fast", "reference"] = "fast"
    """"linear_cross_entropy", and NITP's loss: "fast" takes a chunk's gradients in the forward pass, "reference"
    computes the chunk twice, as NITP's always does with nitp.stop_gradient = false. "generic_cosine" has no chunks."""

    num_chunks: int = 8
    """"chunked_cross_entropy": parts that a sequence is split into."""
