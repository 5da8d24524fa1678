"""From slices of a model to all of it: the same widths with a few blocks, where the whole model does not fit.

NITP's work does not depend on the depth, and every further block is like the last: two slices give the time of a block,
that gives the time of the whole model's step, and what NITP adds to the slice it adds to the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import overhead_percent


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A model with some of its blocks."""

    layers: int
    step_ms: float


def extrapolate(
    shallow: Slice, deep: Slice, *, full_layers: int, step_ms: Mapping[str, float], baseline: str = "ntp"
) -> dict[str, Any]:
    """Return what variants would add to a step of the whole model.

    Args:
        shallow: the baseline with fewer blocks.
        deep: the baseline with more blocks, at which the variants were measured.
        full_layers: blocks of the whole model.
        step_ms: variant -> ms a step with as many blocks as ``deep``.
        baseline: its name, for the text.

    Returns:
        ``layer_ms``, ``full_step_ms``, ``extra_ms`` and ``overhead_percent`` by variant, and ``arithmetic``: the lines
        of the calculation.

    Raises:
        ValueError: the slices are not in order, or a further block took no time, which is noise.
    """
    if not 0 < shallow.layers < deep.layers <= full_layers:
        raise ValueError(f"depths: found {shallow.layers}, {deep.layers} of {full_layers} layers, expected to rise")
    blocks = deep.layers - shallow.layers
    layer_ms = (deep.step_ms - shallow.step_ms) / blocks
    if layer_ms <= 0:
        raise ValueError(
            f"depths: {deep.layers} layers took {deep.step_ms:.3f} ms and {shallow.layers} took {shallow.step_ms:.3f}: "
            "the measurement is too noisy to tell the time of a block; take more steps"
        )
    rest = full_layers - deep.layers
    full_ms = deep.step_ms + rest * layer_ms
    lines = [
        f"a block: ({deep.step_ms:.3f} - {shallow.step_ms:.3f}) ms / {blocks} = {layer_ms:.3f} ms",
        f"{baseline}, {full_layers} layers: {deep.step_ms:.3f} + {rest} x {layer_ms:.3f} = {full_ms:.3f} ms",
    ]
    extra = {name: ms - deep.step_ms for name, ms in step_ms.items()}
    overheads = {name: overhead_percent(full_ms + ms, full_ms) for name, ms in extra.items()}
    for name, ms in extra.items():
        lines.append(
            f"{name}, {full_layers} layers: + ({step_ms[name]:.3f} - {deep.step_ms:.3f}) = {ms:+.3f} ms "
            f"of {full_ms:.3f} ms = {overheads[name]:+.2f} %"
        )
    return {
        "full_layers": full_layers,
        "slices": [{"layers": s.layers, "step_ms": round(s.step_ms, 4)} for s in (shallow, deep)],
        "layer_ms": round(layer_ms, 4),
        "full_step_ms": round(full_ms, 4),
        "extra_ms": {name: round(ms, 4) for name, ms in extra.items()},
        "overhead_percent": {name: round(value, 4) for name, value in overheads.items()},
        "arithmetic": lines,
    }
