"""Which layers a job converts to float8, which it leaves and why. Free of torch.

The converter and ``nitp-titan check`` decide by the same function: one reads the layers off a model's configuration,
the other off the shape of a model of ours (``layers.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from nitp_titan.float8.config import AUTO_FILTER, Float8Config
from nitp_titan.float8.gain import times, why_no_gain
from nitp_titan.float8.layers import MULTIPLE, LinearLayer, RoutedExperts

T = TypeVar("T")

EXPERTS_RECIPE = "rowwise"
"""Of routed experts, whatever the linears': torchao has kernels for no other."""

# As in TorchTitan's own float8 jobs: the logits and the choice of experts stay in high precision.
_ALWAYS_LEFT = {"lm_head": "the unembedding stays in high precision", "router.gate": "routers stay in high precision"}


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


@dataclass(frozen=True, slots=True)
class ExpertsChoice:
    """What becomes of a block's routed experts: they are converted, rowwise, where ``float8.experts`` is on."""

    experts: RoutedExperts
    shape: tuple[int, int, int, int]
    """(M, D, H, G) of one rank."""

    @property
    def no_gain(self) -> str:
        """Why float8 is expected not to be faster, or ""."""
        m, d, h, groups = self.shape
        reasons = (why_no_gain(EXPERTS_RECIPE, m, k, n, groups) for k, n in ((d, h), (h, d)))
        return next(filter(None, reasons), "")

    def speedup(self) -> float:
        """Return their time in bf16 over that in float8, by the roofline."""
        # The same for gate, up and down: forward and backward together do not mind which width is the input's.
        return _speedup([times(EXPERTS_RECIPE, *self.shape)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What becomes of a model's linear layers and routed experts."""

    config: Float8Config
    choices: tuple[Choice, ...]
    experts: tuple[ExpertsChoice, ...] = ()
    """Of the blocks whose routed experts are converted."""

    @property
    def converted(self) -> list[Choice]:
        """The layers that become float8."""
        return [choice for choice in self.choices if not choice.left_because]

    def speedup(self) -> float:
        """Return the time of the converted layers in bf16 over that in float8, by torchao's roofline; 1 of none."""
        return _speedup(times(self.config.recipe, *choice.shape) for choice in self.converted)

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
            text += f", and the routed experts of {len(self.experts)} blocks ({EXPERTS_RECIPE})"
        return text + ("; emulated" if self.config.emulate else "")

    def lines(self) -> Iterator[str]:
        """Yield a line for each kind of layer: its name, number and shape, and its gain or why it is left."""
        for group in _groups(self.choices):
            choice, (_, k, n) = group[0], group[0].shape
            gain = _speedup([times(self.config.recipe, *choice.shape)])
            what = choice.left_because or choice.no_gain or f"at most {gain:.2f}x as fast"
            verb = "left     " if choice.left_because else "converted"
            yield f"{verb} {_name(group)}{_count(group)}, {k} -> {n}: {what}"
        for alike in _alike(self.experts, lambda found: (_without_numbers(found.experts.name), found.shape)):
            found, (_, d, h, experts) = alike[0], alike[0].shape
            what = found.no_gain or f"at most {found.speedup():.2f}x as fast"
            name = _without_numbers(found.experts.name)
            yield f"converted {name}{_count(alike)}, {experts} experts of {d} -> {h} -> {d}: {what}"

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
        if not emulate and (losing := [found for found in self.experts if found.no_gain]):
            blocks = f"{len(losing)} of {len(self.experts)} blocks"
            yield (
                f"float8.experts: no gain expected on the routed experts of {blocks}: {losing[0].no_gain}; "
                "experts = false leaves them"
            )
        if emulate and gpu:
            yield "float8.emulate is on: float8's numbers at less than the speed of bf16"
        if not emulate and not compiled:
            advice = 'set compile.enable = true, with "model" in compile.components'
            yield f"float8 gains nothing without torch.compile of the model, which fuses its casts: {advice}"


def plan(
    config: Float8Config,
    layers: Iterable[LinearLayer],
    *,
    tokens: int,
    experts: Iterable[RoutedExperts] = (),
    tensor_parallel: int = 1,
    expert_parallel: int = 1,
) -> Plan:
    """Decide what becomes of each layer.

    Args:
        config: the ``[float8]`` table, with a recipe other than "none".
        layers: the linear layers of the model.
        tokens: a rank's at a time.
        experts: those of each block that has some; they count where ``config.experts`` is set.
        tensor_parallel: degree of tensor parallelism.
        expert_parallel: degree of expert parallelism.
    """
    names = [name for name in config.filter_fqns if name != AUTO_FILTER]
    automatic = AUTO_FILTER in config.filter_fqns
    choices = []
    for layer in layers:
        shape = min(tokens, layer.at_most or tokens), *layer.local(tensor_parallel)
        why = _why_left(layer, shape[1:], names)
        no_gain = "" if why else why_no_gain(config.recipe, *shape)
        choices.append(Choice(layer, shape, why or (no_gain if automatic else ""), no_gain))
    degrees = {"tensor_parallel": tensor_parallel, "expert_parallel": expert_parallel}
    chosen = [ExpertsChoice(each, each.local(tokens, **degrees)) for each in experts if config.experts]
    return Plan(config=config, choices=tuple(choices), experts=tuple(chosen))


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


def _groups(choices: Iterable[Choice]) -> list[list[Choice]]:
    """Put together what differs in the number of its block, or in its last name, alone."""

    def key(choice: Choice) -> Any:
        module = _without_numbers(choice.layer.name).rpartition(".")[0]
        return module or choice.layer.name, choice.shape, choice.left_because, choice.no_gain

    return _alike(choices, key)


def _alike(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Put together what has the same key, wherever it stands."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _count(group: list[Any]) -> str:
    return f" x {len(group)}" if len(group) > 1 else ""


def _speedup(pairs: Iterable[tuple[float, float]]) -> float:
    """Return the sum of all seconds in bf16 over that in float8, from (bf16, float8) pairs; 1 of none."""
    bf16, float8 = (sum(column) for column in zip(*pairs, strict=True)) if (pairs := list(pairs)) else (1.0, 1.0)
    return bf16 / float8


def _name(group: list[Choice]) -> str:
    module, dot, _ = _without_numbers(group[0].layer.name).rpartition(".")
    last = dict.fromkeys(choice.layer.name.rpartition(".")[2] for choice in group)
    return f"{module}{dot}{'/'.join(last)}"


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
