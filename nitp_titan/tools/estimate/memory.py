"""What a rank of a run holds in memory, by part.

An estimate of the peak of one rank, the largest one, in these parts. They add up to the
total although not all of them peak at the same time, so that it errs on the large side.

- weights, gradients: 4 bytes a parameter (2 under ``training.dtype = "bfloat16"``), sharded by FSDP, tensor and expert
  parallelism. FSDP splits the experts of a block as whole ones while there are at least as many as ranks: the largest
  share is rounded up.
- optimizer_states: two moments, like the weights (2 bytes each under "fused_opt_states_bf16").
- projector: its share of these three. An exported model has none of it.
- gathered_parameters: the root unit (NITP's projector) and the unembedding's, which stay gathered, and the largest
  block twice, itself and the one that is fetched ahead; in the compute dtype.
- gradient_reduction: the whole gradients of the largest unit, in the compute dtype and as the fp32 copy to reduce.
- activations: what the forward pass of the rank's micro-batch keeps for the backward pass, by the mode of
  activation checkpointing; of the eager model, and with tokens spread evenly over the experts. A compiled model keeps
  less. "memory_budget" is taken as that share of the way from "full" to "none".
- block_backward: what the backward pass of the largest block recomputes, and the gradients of its inner activations.
- saved_target: NITP's z is the input of a block or of the final norm, which keep it anyway, under every mode of
  checkpointing and however it is sharded: 0.
- nitp_loss: of a chunk of tokens, the inner activations of the projector and the fp32 copies that the loss takes of
  prediction and target; and the gradients that are taken in the forward pass, as those of the cross-entropy.
- cross_entropy: the logits of a chunk of tokens and their gradient in the compute dtype, and two such tensors in fp32
  inside the loss. "linear_cross_entropy" takes its gradients in the forward pass (``loss.implementation`` "fast"): the
  unembedding's, in fp32 where there are several chunks, and the last hidden state's.
- pipeline_buffers: under pipeline parallelism alone. What a stage receives: each micro-batch's input (with z, after its
  block) and each output's gradient, held from the first step on.

A pipeline's rank is estimated from its ``Stage``: its own blocks, as many micro-batches of activations as its schedule
has forward and not yet backward, and whole gradients of all its units, since FSDP reduces them after the last
micro-batch. Embedding and loss count where they are.

Left out: CUDA's context, NCCL's buffers, fragmentation, attention's block masks, data, CUDA graphs, geometry metrics.
``CAPACITY`` leaves room for them: an "80 GB" GPU has 79 to 80 GiB, of which the estimate may take 80e9 bytes, 74.5 GiB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nitp_titan.models.costs import Block, Parts
from nitp_titan.nitp.config import LOSS_KINDS, NITPConfig, has_projector, projector_params

if TYPE_CHECKING:
    from nitp_titan.job.layout import Layout

GIB = 2**30
CAPACITY = 80e9
"""Bytes of a rank that the estimate may take on an 80 GB GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a rank does at a time, and in which precision."""

    sequences: int
    """Sequences of a micro-batch."""
    seq_len: int
    logits_tokens: int
    """Tokens of a rank whose logits exist at a time."""
    eager_loss: bool = False
    """Whether the losses take their gradients in the forward pass."""
    checkpointing: str = "none"
    """"none", "selective", "full" or "memory_budget"."""
    memory_budget: float = 0.5
    compute_bytes: int = 2
    """Of a number in matrix products and activations."""
    weight_bytes: int = 4
    """Of a number of the weights that the optimizer updates, and of their gradients."""
    state_bytes: int = 4
    """Of a number of an optimizer's moment."""
    reshard: bool = True
    """Whether a block's weights are freed between its forward and its backward pass."""
    offload: bool = False
    """Whether weights, gradients and optimizer states live on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What a rank of a pipeline has of the model: one part of it, or several where the schedule interleaves them."""

    in_flight: dict[int, int]
    """Its blocks, counted from 0, and the micro-batches whose activations each of them keeps at a time."""
    first: bool
    """Whether it has the embedding."""
    last: bool
    """Whether it has the unembedding, and with it the losses and the projector."""
    micro_batches: int
    """Of a step's forward and backward pass."""
    received: int
    """Tensors (B, L, D) that it receives for a micro-batch, gradients included."""


def memory(
    parts: Parts, nitp: NITPConfig, layout: Layout, run: Run, stage: Stage | None = None
) -> dict[str, float] | None:
    """Estimate the memory of a rank in GiB, by part, with their sum as ``total``.

    The module's docstring says what each part is. ``run.sequences`` are those of a pipeline's micro-batch, if any.
    None for a pipeline of which no ``stage`` is given.
    """
    if stage is None:
        if layout.pipeline > 1:
            return None
        in_flight = dict.fromkeys(range(len(parts.blocks)), 1)
        stage = Stage(in_flight=in_flight, first=True, last=True, micro_batches=1, received=0)
    rank = _Rank(parts, layout, run)
    fsdp, compute = rank.fsdp, run.compute_bytes
    tokens = run.sequences * run.seq_len / layout.context
    blocks = [parts.blocks[index] for index in stage.in_flight]
    table = parts.vocab_size * parts.dim / layout.tensor
    head = table * stage.last
    tables = table if parts.tied else table * stage.first + head
    projector = projector_params(parts.dim, nitp) / layout.tensor * stage.last

    norms = parts.final_norm * stage.last + parts.other * stage.first
    local = (tables + norms) / fsdp + sum(map(rank.stored, blocks))
    kept_bytes = 0 if run.offload else 2 * run.weight_bytes + 2 * run.state_bytes
    units = [rank.gathered(block) for block in blocks]
    gathered = head + norms + 2 * max(units, default=0) if run.reshard else tables + norms + sum(units)
    largest = max(*units, min(table, tables) + norms, projector)
    gradients = (compute + 4) * largest
    if layout.pipeline > 1:
        gradients += 4 * (tables + norms + projector + sum(units))

    kept = sum(number * rank.saved(parts.blocks[i], run.checkpointing) for i, number in stage.in_flight.items())
    block_backward = max(
        (
            rank.saved(block, "none") - rank.saved(block, run.checkpointing) + rank.inner_gradients(block)
            for block in blocks
        ),
        default=0,
    )
    cross_entropy = nitp_loss = 0.0
    if stage.last:
        # Those of the part that ends in the unembedding.
        at_end = stage.in_flight.get(len(parts.blocks) - 1, 1)
        # The final norm's input and output. The output is whole where tensor parallelism splits the sequence.
        kept += at_end * compute * parts.dim * (1 / rank.sequence + 1)
        cross_entropy = min(run.logits_tokens, tokens) * parts.vocab_size / layout.tensor * (2 * compute + 4 + 4)
        if run.eager_loss:
            cross_entropy += at_end * rank.eager_gradients(table, tokens, chunked=run.logits_tokens < tokens)
        nitp_loss = rank.nitp_loss(nitp, tokens, in_flight=at_end) if nitp.enable else 0
    sizes = {
        "weights": local * (0 if run.offload else run.weight_bytes),
        "gradients": local * (0 if run.offload else run.weight_bytes),
        "optimizer_states": local * (0 if run.offload else 2 * run.state_bytes),
        "projector": projector / fsdp * kept_bytes,
        "gathered_parameters": compute * (gathered + projector),
        "gradient_reduction": gradients,
        "activations": tokens * kept,
        "block_backward": tokens * block_backward,
        "saved_target": 0,
        "nitp_loss": nitp_loss,
        "cross_entropy": cross_entropy,
    }
    if layout.pipeline > 1:
        sizes["pipeline_buffers"] = stage.micro_batches * stage.received * tokens * parts.dim * compute / rank.sequence
    gib = {name: size / GIB for name, size in sizes.items()}
    return gib | {"total": sum(gib.values())}


def fits(memory_gib: dict[str, float] | None) -> bool | None:
    """Whether a rank's memory fits an 80 GB GPU; None where it is not known."""
    return None if memory_gib is None else memory_gib["total"] * GIB <= CAPACITY


def verdict(memory_gib: dict[str, float]) -> str:
    """Return :func:`fits` in words."""
    return f"{'fits' if fits(memory_gib) else 'does not fit'} a GPU of 80 GB ({CAPACITY / GIB:.1f} GiB)"


@dataclass(frozen=True, slots=True)
class _Rank:
    """A rank's share of a block. Sizes of activations are bytes per token of its micro-batch."""

    parts: Parts
    layout: Layout
    run: Run

    @property
    def fsdp(self) -> int:
        return self.layout.shard * self.layout.context

    @property
    def sequence(self) -> int:
        """How many ranks share the residual stream of a sequence."""
        return self.layout.tensor if self.layout.sequence_parallel else 1

    def nitp_loss(self, nitp: NITPConfig, tokens: float, in_flight: int) -> float:
        """Bytes at the peak of the NITP loss, of a rank with this many tokens of a micro-batch."""
        c, d, tensor = self.run.compute_bytes, self.parts.dim, self.layout.tensor
        rows = tokens / self.sequence
        if not nitp.has_target:
            return tokens * LOSS_KINDS[nitp.loss] * d
        at_a_time = nitp.projector_tokens(self.run.logits_tokens, dim=d, vocab_size=self.parts.vocab_size)
        in_chunk = min(at_a_time / self.sequence, rows)
        # Gate, its activation, up and their product, of the rows that all ranks of the group have in a chunk.
        inner = 4 * nitp.projector_ratio * d * c * self.sequence / tensor if has_projector(nitp) else 0
        size = in_chunk * (inner + LOSS_KINDS[nitp.loss] * d)
        # The last hidden states once more, in the order in which a chunk has rows of every rank's part.
        size += tokens * d * c * (self.sequence > 1)
        if self.run.eager_loss and nitp.stop_gradient:
            weights = projector_params(d, nitp) / tensor
            size += in_flight * self.eager_gradients(weights, tokens, chunked=in_chunk < rows)
        return size

    def eager_gradients(self, weights: float, tokens: float, *, chunked: bool) -> float:
        """Bytes of what a loss keeps that takes its gradients in the forward pass: of weights and hidden states.

        Over several chunks those of the weights are added up in fp32.
        """
        c = self.run.compute_bytes
        return weights * (4 if chunked else c) + tokens * self.parts.dim * c

    def stored(self, block: Block) -> float:
        """Parameters of the rank."""
        layout = self.layout
        split = (block.attention + block.feed_forward + block.shared_experts) / layout.tensor
        rest = (split + block.router + block.norms) / self.fsdp
        if not block.num_experts:
            return rest
        # Expert parallelism takes the ranks of tensor parallelism along; without it, that splits each expert.
        expert = block.routed_experts / block.num_experts
        if layout.expert > 1:
            ranks = self.fsdp * layout.tensor // layout.expert
            whole = ranks * layout.expert <= block.num_experts
        else:
            ranks = self.fsdp
            whole = ranks * layout.replicate <= block.num_experts
            expert /= layout.tensor
        experts = block.num_experts / layout.expert
        return rest + expert * (math.ceil(experts / ranks) if whole else experts / ranks)

    def gathered(self, block: Block) -> float:
        """Parameters of the rank while FSDP has gathered them."""
        layout = self.layout
        split = (block.attention + block.feed_forward + block.shared_experts) / layout.tensor
        experts = block.routed_experts / (layout.expert if layout.expert > 1 else layout.tensor)
        return split + block.router + block.norms + experts

    def saved(self, block: Block, mode: str) -> float:
        """What the forward pass keeps of a block."""
        if mode == "memory_budget":
            full, budget = self.saved(block, "full"), self.run.memory_budget
            return full + budget * (self.saved(block, "none") - full)
        c, d, tensor = self.run.compute_bytes, self.parts.dim, self.layout.tensor
        residual = c * d / self.sequence
        if mode == "full":
            return residual
        qkv = c * (block.query + block.key + block.value) / tensor
        attended = (c * block.attended + 4 * block.heads) / tensor  # and the logarithm of each softmax's sum
        dense, expert, shared = self._widths(block)
        if mode == "selective":
            # Every second matrix product: query-key-value, gate and down; attention, the choice of experts.
            kept = residual + qkv + attended + c * (dense + shared) / tensor
            kept += c * d if dense or shared else 0
            # Sums over tensor parallelism are not repeated either, nor is the exchange of tokens among experts.
            kept += 2 * residual if tensor > 1 else 0
            kept += 2 * block.top_k * c * d / tensor if block.num_experts and self.layout.expert > 1 else 0
            return kept + 12 * block.top_k
        rotary = 4 * block.query / block.heads if block.heads else 0
        # Input and output of both norms (their output whole, as products take it), and rotated queries and keys.
        kept = 2 * residual + 2 * c * d + 8 + qkv + attended + rotary
        # Gate, its activation, up, and their product.
        kept += 4 * c * (dense + shared) / tensor
        if block.num_experts:
            # The router computes in fp32, and its choice is sorted.
            kept += (4 * d if c < 4 else 0) + 4 * block.num_experts + 32 * block.top_k + 4
            kept += self._routed(block) * (c * d + 4 * d + 4 * c * self._expert_width(expert))
        return kept

    def inner_gradients(self, block: Block) -> float:
        """What a block's backward pass holds besides what it reads."""
        c, d = self.run.compute_bytes, self.parts.dim
        dense, expert, shared = self._widths(block)
        routed = self._routed(block) * (c * d + 4 * d + 2 * c * self._expert_width(expert)) if block.num_experts else 0
        return c * d + max(2 * c * max(dense, shared) / self.layout.tensor, routed)

    def _routed(self, block: Block) -> float:
        """Tokens that a rank's experts see for each of its own."""
        return block.top_k / (self.layout.tensor if self.layout.expert > 1 else 1)

    def _expert_width(self, expert: float) -> float:
        return expert if self.layout.expert > 1 else expert / self.layout.tensor

    def _widths(self, block: Block) -> tuple[float, float, float]:
        """Hidden widths of the dense feed-forward, of an expert and of the shared experts together."""
        d = self.parts.dim
        expert = block.routed_experts / (3 * d * block.num_experts) if block.num_experts else 0
        return block.feed_forward / (3 * d), expert, block.shared_experts / (3 * d)
