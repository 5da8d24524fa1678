"""Which linear layers a job converts to float8, which it leaves and why. Free of torch.

The converter and ``nitp-titan check`` decide by the same function: one reads the layers off a model's configuration,
the other off the shape of a model of ours (:func:`layers_of_shape`).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nitp_titan.costs import has_projector
from nitp_titan.float8.config import AUTO_FILTER, Float8Config
from nitp_titan.float8.gain import times, why_no_gain
from nitp_titan.models.flavors import Shape
from nitp_titan.nitp_config import CHUNK_TOKENS, NITPConfig

MULTIPLE = 16
"""What every dimension of a float8 product must be a multiple of."""

# As in TorchTitan's own float8 jobs: the logits and the choice of experts stay in high precision.
_ALWAYS_LEFT = {"lm_head": "the unembedding stays in high precision", "router.gate": "routers stay in high precision"}

# How TorchTitan's decoders shard a linear over tensor parallelism, by the last part of its name: these by input
# features, these not at all, all others by output features.
_SHARDED_BY_INPUT = ("wo", "w2")
_NOT_SHARDED = ("wq_a", "wkv_a", "gate")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearLayer:
    """A linear layer of a model."""

    name: str
    in_features: int
    out_features: int
    special: bool = False
    """Whether its class multiplies in a way of its own."""
    at_most: int | None = None
    """Tokens that it takes at a time; None = all of a micro-batch."""

    def local(self, tensor_parallel: int) -> tuple[int, int]:
        """Return (K, N): the input and output features that one rank multiplies."""
        last = self.name.rsplit(".", 1)[-1]
        if last in _NOT_SHARDED:
            return self.in_features, self.out_features
        if last in _SHARDED_BY_INPUT:
            return self.in_features // tensor_parallel, self.out_features
        return self.in_features, self.out_features // tensor_parallel


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of a layer."""

    layer: LinearLayer
    shape: tuple[int, int, int]
    """(M, K, N) of one rank: tokens, input and output features."""
    left_because: str = ""
    """Why it stays in high precision; "" where it is converted."""
    no_gain: str = ""
    """Why float8 is expected not to be faster, of a layer that could be converted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What becomes of a model's linear layers."""

    config: Float8Config
    choices: tuple[Choice, ...]
    experts: int = 0
    """Blocks whose routed experts are converted."""

    @property
    def converted(self) -> list[Choice]:
        """The layers that become float8."""
        return [choice for choice in self.choices if not choice.left_because]

    def speedup(self) -> float:
        """Return the time of the converted layers in bf16 over that in float8, by torchao's roofline; 1 of none."""
        pairs = [times(self.config.recipe, *choice.shape) for choice in self.converted]
        bf16, float8 = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (1.0, 1.0)
        return bf16 / float8

    def summary(self) -> str:
        """Return the plan in a line."""
        text = f"{self.config.recipe}: {len(self.converted)} of {len(self.choices)} linear layers converted"
        if self.converted and not self.config.emulate:
            gaining, speedup = any(not choice.no_gain for choice in self.converted), self.speedup()
            verdict = (
                f"these at most {speedup:.2f}x as fast on an H100" if gaining and speedup > 1 else "no gain expected"
            )
            text += f" ({verdict})"
        if self.experts:
            text += f", and the routed experts of {self.experts} blocks (rowwise)"
        return text + ("; emulated" if self.config.emulate else "")

    def lines(self) -> Iterator[str]:
        """Yield a line for each kind of layer: its name, number and shape, and its gain or why it is left."""
        for group in _groups(self.choices):
            choice, (_, k, n) = group[0], group[0].shape
            bf16, float8 = times(self.config.recipe, *choice.shape)
            what = choice.left_because or choice.no_gain or f"at most {bf16 / float8:.2f}x as fast"
            count = f" x {len(group)}" if len(group) > 1 else ""
            yield f"{'left     ' if choice.left_because else 'converted'} {_name(group)}{count}, {k} -> {n}: {what}"

    def warnings(self, *, compiled: bool, gpu: bool) -> Iterator[str]:
        """Yield what the user should know before a run: nothing converted, or slower than bf16.

        Args:
            compiled: whether the model is.
            gpu: whether there is one.
        """
        recipe, emulate = self.config.recipe, self.config.emulate
        if not self.converted and not self.experts:
            reasons = dict.fromkeys(choice.left_because for choice in self.choices if not choice.no_gain)
            if any(choice.no_gain for choice in self.choices):
                reasons = ["no gain expected on any layer that could be"]
            yield f"float8 {recipe} converts nothing: {', '.join(reasons)}"
        losing = [choice for choice in self.converted if choice.no_gain]
        if losing and not emulate:
            kinds = ", ".join(_name(group) for group in _groups(losing))
            yield (
                f"float8 {recipe}: no gain expected on {len(losing)} of {len(self.converted)} converted layers: "
                f'{kinds}; filter_fqns = ["{AUTO_FILTER}"] leaves them'
            )
        if emulate and gpu:
            yield "float8.emulate is on: float8's numbers at less than the speed of bf16"
        if not emulate and not compiled:
            yield "float8 gains nothing without torch.compile, which fuses its casts: set compile.enable = true"


def plan(
    config: Float8Config, layers: Iterable[LinearLayer], *, tokens: int, tensor_parallel: int = 1, experts: int = 0
) -> Plan:
    """Decide what becomes of each layer.

    Args:
        config: the ``[float8]`` table, with a recipe other than "none".
        layers: the linear layers of the model.
        tokens: a rank's at a time.
        tensor_parallel: degree of tensor parallelism.
        experts: blocks with routed experts; they count where ``config.experts`` is set.
    """
    names = [name for name in config.filter_fqns if name != AUTO_FILTER]
    automatic = AUTO_FILTER in config.filter_fqns
    choices = []
    for layer in layers:
        shape = min(tokens, layer.at_most or tokens), *layer.local(tensor_parallel)
        why = _why_left(layer, shape[1:], names)
        no_gain = "" if why else why_no_gain(config.recipe, *shape)
        choices.append(Choice(layer, shape, why or (no_gain if automatic else ""), no_gain))
    return Plan(config=config, choices=tuple(choices), experts=experts if config.experts else 0)


def _why_left(layer: LinearLayer, features: Iterable[int], filter_fqns: list[str]) -> str:
    for part, reason in _ALWAYS_LEFT.items():
        if part in layer.name:
            return reason
    if match := next((part for part in filter_fqns if part in layer.name), None):
        return f'filter_fqns has "{match}"'
    if layer.special:
        return "a linear layer with a product of its own"
    if any(size % MULTIPLE for size in features):
        return f"not a multiple of {MULTIPLE}"
    return ""


def tokens_at_a_time(sequences: int, seq_len: int, *, context: int, pipeline: int, microbatch: int) -> int:
    """Return the tokens that a rank has at a time.

    Args:
        sequences: a rank's local batch size.
        context: degree of context parallelism.
        pipeline: degree of pipeline parallelism.
        microbatch: sequences of a pipeline's micro-batch.
    """
    return (microbatch if pipeline > 1 else sequences) * seq_len // context


def experts_problem(dim: int, hidden_dim: int) -> str:
    """Return why routed experts of this shape cannot be float8, or ""."""
    wrong = [str(size) for size in (dim, hidden_dim) if size % MULTIPLE]
    return f"the experts' {' and '.join(wrong)} should be a multiple of {MULTIPLE}" if wrong else ""


def unmatched(config: Float8Config, layers: Iterable[LinearLayer]) -> Iterator[tuple[str, str]]:
    """Yield (word of ``filter_fqns`` that is in no layer's name, nearest part of one or "")."""
    # The projector's also where NITP is off, so that one file serves both sides of a comparison.
    names = [*(layer.name for layer in layers), *(f"projector.w{part}" for part in (1, 2, 3))]
    known = {AUTO_FILTER: None}
    for name in names:
        parts = [part for part in name.split(".") if not part.isdigit()]
        known |= dict.fromkeys([*parts, *(".".join(pair) for pair in pairwise(parts))])
    for word in config.filter_fqns:
        if word != AUTO_FILTER and not any(word in name for name in names):
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
            yield word, near[0] if near else ""


def layers_of_shape(shape: Shape, nitp: NITPConfig, *, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[LinearLayer]:
    """Yield the linear layers of a model of ours and of NITP's projector.

    Args:
        chunk_tokens: of the loss.
    """
    d, heads = shape.dim, shape.n_heads * shape.head_dim
    yield _layer("lm_head", d, shape.vocab_size)
    for index in range(shape.n_layers):
        block = f"layers.{index}"
        yield _layer(f"{block}.attention.qkv_linear.wqkv", d, heads + 2 * shape.n_kv_heads * shape.head_dim)
        yield _layer(f"{block}.attention.wo", heads, d)
        if index < shape.n_layers - shape.moe_layers():
            yield from _feed_forward(f"{block}.feed_forward", d, shape.hidden_dim)
            continue
        yield _layer(f"{block}.moe.router.gate", d, shape.num_experts)
        if shape.num_shared_experts:
            width = shape.expert_hidden_dim * shape.num_shared_experts
            yield from _feed_forward(f"{block}.moe.shared_experts", d, width)
    if has_projector(nitp):
        at_most = nitp.projector_tokens(chunk_tokens, dim=d, vocab_size=shape.vocab_size)
        for layer in _feed_forward("projector", d, nitp.projector_ratio * d):
            yield dataclasses.replace(layer, at_most=at_most)


def _layer(name: str, in_features: int, out_features: int) -> LinearLayer:
    return LinearLayer(name=name, in_features=in_features, out_features=out_features)


def _feed_forward(name: str, dim: int, hidden: int) -> Iterator[LinearLayer]:
    for part in ("w1", "w3"):
        yield _layer(f"{name}.{part}", dim, hidden)
    yield _layer(f"{name}.w2", hidden, dim)


def _groups(choices: Iterable[Choice]) -> list[list[Choice]]:
    """Put together what differs in the number of its block, or in its last name, alone."""
    groups: dict[Any, list[Choice]] = {}
    for choice in choices:
        module = _without_numbers(choice.layer.name).rpartition(".")[0]
        key = module or choice.layer.name, choice.shape, choice.left_because, choice.no_gain
        groups.setdefault(key, []).append(choice)
    return list(groups.values())


def _name(group: list[Choice]) -> str:
    module, dot, _ = _without_numbers(group[0].layer.name).rpartition(".")
    last = dict.fromkeys(choice.layer.name.rpartition(".")[2] for choice in group)
    return f"{module}{dot}{'/'.join(last)}"


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
