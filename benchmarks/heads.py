"""Ways to take the cross-entropy of an unembedding, forward and backward, from hidden states alone.

Each gives the sum over tokens, and gradients of hidden states and weight. Ours are the code that trains: an NITP
decoder whose only block hands its input on, without embedding and norm, so that hidden states go in and loss sums out.
"""

# Shape suffixes: B = sequences, L = tokens of a sequence, D = model dim, V = vocabulary

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss, cross_entropy_loss
from torchtitan.config import CompileConfig
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module

from benchmarks.batches import packed_batch
from nitp_titan.models.flavors import Shape
from nitp_titan.models.registry import decoder_config, model_registry
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.titan.spec import nitp_model_spec


class Unavailable(Exception):
    """An implementation cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One size of the problem, and how to compute it."""

    tokens: int
    vocab_size: int
    dim: int
    dtype: str
    device: str
    seq_len: int
    """Tokens of a sequence; a divisor of ``tokens``."""
    compile: bool
    chunk_tokens: int
    """Ours: tokens whose logits exist at a time."""
    num_chunks: int = 8
    """TorchTitan's: parts of a sequence."""


class Problem:
    """The tensors of a case; the same for all implementations, which leave their gradients in them."""

    def __init__(self, case: Case, seed: int = 0):
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        inputs, labels_BL = packed_batch(
            generator,
            sequences=case.tokens // case.seq_len,
            seq_len=case.seq_len,
            vocab_size=case.vocab_size,
            mean_document=1024,
        )
        self.labels_BL = labels_BL.to(case.device)
        self.positions_BL = inputs["positions"].to(case.device)
        shape = (*labels_BL.shape, case.dim)
        # A final norm's output, and weights that give logits of about 1.
        self.h_BLD = torch.randn(shape, generator=generator).to(case.device, dtype).requires_grad_()
        weight_VD = torch.randn(case.vocab_size, case.dim, generator=generator) / case.dim**0.5
        self.weight_VD = torch.nn.Parameter(weight_VD.to(case.device, dtype))

    def forget(self) -> None:
        """Drop the gradients."""
        self.h_BLD.grad = self.weight_VD.grad = None


@dataclass(frozen=True, slots=True)
class Head:
    """An implementation, ready for one problem."""

    problem: Problem
    losses: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    """Runs forward; returns what is trained on, and the sum of cross-entropies (the same, without NITP)."""
    more: torch.nn.Module | None = None
    """What has parameters beside the unembedding."""

    def step(self) -> float:
        """Run forward and backward on clear gradients; return the sum of cross-entropies."""
        self.forget()
        total, cross_entropy = self.losses()
        total.backward()
        return float(cross_entropy.detach())

    def run(self, steps: int) -> None:
        """Run forward and backward a number of times."""
        for _ in range(steps):
            self.forget()
            self.losses()[0].backward()

    def release(self) -> None:
        """Drop the gradients."""
        self.forget()

    def forget(self) -> None:
        self.problem.forget()
        if self.more is not None:
            self.more.zero_grad(set_to_none=True)


class _HandOn(Module):
    """A block that returns its input."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config):
        super().__init__()

    def forward(self, h_BLD: torch.Tensor, *args: Any) -> torch.Tensor:
        return h_BLD


def joint_decoder(problem: Problem, nitp: NITPConfig, **options: Any) -> Any:
    """Return an NITP decoder that takes hidden states (B, L, D) in the tokens' place, with the problem's unembedding.

    They are also NITP's target: kept by somebody anyway, as a block's input is in training.

    Args:
        options: of ``nitp_model_spec``, where they are not the case's.
    """
    case = problem.case
    shape = Shape(
        dim=case.dim,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=2,
        hidden_dim=1,
        vocab_size=case.vocab_size,
        max_seq_len=case.seq_len,
    )
    config = decoder_config(shape)
    config.layers = [_HandOn.Config()]
    spec = dataclasses.replace(model_registry("debug"), model=config)
    with torch.device("meta"):
        twin = nitp_model_spec(spec, nitp, **{"chunk_tokens": case.chunk_tokens, **options})
        model: Any = twin.model.build()
    # What a pipeline stage has that is neither the first nor the last: hidden states pass through.
    model.tok_embeddings = model.norm = None
    model.lm_head.weight = problem.weight_VD
    if model.projector is not None:
        torch.manual_seed(0)
        model.projector.to_empty(device=case.device)
        with torch.no_grad():
            for parameter in model.projector.parameters():
                parameter.normal_(std=0.02)
        model.projector.to(problem.h_BLD.dtype)
    if case.compile:
        model.lm_head.compile_loss("inductor")
        model.compile_nitp_loss("inductor")
        if model.projector is not None:
            model.projector.compile(backend="inductor", fullgraph=True)
    return model


def _joint(problem: Problem, *, active: bool, **options: Any) -> Head:
    nitp = NITPConfig(target_layer=1)
    model = joint_decoder(problem, nitp, **options)
    model.nitp_active = active

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        sums = model(problem.h_BLD, positions=problem.positions_BL, labels=problem.labels_BL)[0]
        # The NITP sum is a zero without a gradient where it is not active.
        return sums[0] + nitp.weight * sums[1], sums[0]

    return Head(problem, losses, model)


def ours(problem: Problem) -> Head:
    return _joint(problem, active=False)


def ours_with_nitp(problem: Problem) -> Head:
    return _joint(problem, active=True)


def ours_in_halved_chunks(problem: Problem) -> Head:
    return _joint(problem, active=False, chunk_tokens=problem.case.chunk_tokens // 2)


def ours_in_doubled_chunks(problem: Problem) -> Head:
    return _joint(problem, active=False, chunk_tokens=problem.case.chunk_tokens * 2)


def ours_recomputed(problem: Problem) -> Head:
    return _joint(problem, active=False, implementation="reference")


def ours_recomputed_with_nitp(problem: Problem) -> Head:
    return _joint(problem, active=True, implementation="reference")


def torchtitan_chunked(problem: Problem) -> Head:
    """TorchTitan's ``ChunkedLossWrapper``. It takes gradients inside forward; a factor on its result does nothing."""
    case = problem.case
    if case.seq_len % case.num_chunks:
        raise Unavailable(f"a sequence of {case.seq_len} tokens does not split into {case.num_chunks} equal chunks")
    head = Linear.Config(in_features=1, out_features=1).build()
    head.weight = problem.weight_VD
    inner = CrossEntropyLoss.Config(global_vocab_size=case.vocab_size)
    loss_fn: Any = ChunkedLossWrapper.Config(num_chunks=case.num_chunks, loss_fn=inner).build(
        compile_config=CompileConfig(enable=case.compile)
    )
    loss_fn.set_lm_head(head)
    return _of_one(problem, lambda: loss_fn(problem.h_BLD, problem.labels_BL)[0])


def torchtitan_plain(problem: Problem) -> Head:
    """TorchTitan's ``CrossEntropyLoss``: whole logits."""
    loss_fn = _compiled(problem, cross_entropy_loss)
    return _of_one(problem, lambda: loss_fn(F.linear(problem.h_BLD, problem.weight_VD), problem.labels_BL))


def torch_chunked(problem: Problem) -> Head:
    """``torch.nn.functional.linear_cross_entropy`` with its own choice of chunks; it cannot be compiled."""
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy (2.13 and newer)")
    options = torch.nn.LinearCrossEntropyOptions()
    weight_VD = problem.weight_VD
    return _of_rows(problem, lambda h, labels: function(h, weight_VD, labels, reduction="sum", options=options))


def liger(problem: Problem) -> Head:
    """Liger's fused linear cross-entropy: Triton kernels."""
    if problem.case.device == "cpu":
        raise Unavailable("Liger's kernels need a GPU")
    try:
        transformers = importlib.import_module("liger_kernel.transformers")
    except ImportError as error:
        raise Unavailable(f"liger-kernel is not installed ({error})") from error
    # Its own sum is in the gradients' bfloat16.
    loss_fn = transformers.LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return _of_rows(problem, lambda h, labels: loss_fn(problem.weight_VD, h, labels))


def _of_one(problem: Problem, loss: Callable[[], torch.Tensor]) -> Head:
    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        total = loss()
        return total, total

    return Head(problem, losses)


def _of_rows(problem: Problem, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Head:
    return _of_one(problem, lambda: loss(problem.h_BLD.flatten(0, 1), problem.labels_BL.flatten()))


def _compiled(problem: Problem, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return torch.compile(function) if problem.case.compile else function


IMPLEMENTATIONS: dict[str, tuple[Callable[[Problem], Head], str]] = {
    "ours": (ours, "as it trains: a chunk's gradients in the forward pass"),
    "ours+nitp": (ours_with_nitp, "the same with the NITP term"),
    "ours_in_halved_chunks": (ours_in_halved_chunks, "half as many tokens at a time"),
    "ours_in_doubled_chunks": (ours_in_doubled_chunks, "twice as many"),
    "ours_recomputed": (ours_recomputed, "its reference: chunks computed again in the backward pass"),
    "ours_recomputed+nitp": (ours_recomputed_with_nitp, "the same with the NITP term"),
    "torchtitan_chunked": (torchtitan_chunked, "TorchTitan's ChunkedLossWrapper, 8 chunks of a sequence"),
    "torchtitan_plain": (torchtitan_plain, "TorchTitan's CrossEntropyLoss, whole logits"),
    "torch_chunked": (torch_chunked, "torch.nn.functional.linear_cross_entropy, chunked"),
    "liger": (liger, "Liger's fused linear cross-entropy with its own chunks, gradients added up in fp32"),
}
"""Name -> what builds it, and what it is. A builder raises :class:`Unavailable`."""
