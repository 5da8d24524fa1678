"""The ``[float8]`` table of a job. Free of torch, so that a job file is checked without importing it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Recipe = Literal["none", "rowwise", "rowwise_with_gw_hp", "tensorwise"]

AUTO_FILTER = "auto_filter_small_kn"
"""The word of ``filter_fqns`` that leaves layers without an expected gain; TorchTitan's name for it."""


@dataclass(kw_only=True, slots=True)
class Float8Config:
    """Matrix products in float8. With ``recipe = "none"`` a run is what it is without this table, bit for bit."""

    recipe: Recipe = "none"
    """Scaling of torchao's float8 linears: one scale a tensor ("tensorwise", the fastest), one a row and column
    ("rowwise"), or the latter with the weight's gradient in high precision ("rowwise_with_gw_hp"). "none" = off."""

    filter_fqns: list[str] = field(default_factory=list)
    """Parts of module names whose linears stay in high precision; "auto_filter_small_kn" leaves those that would not
    gain."""

    experts: bool = False
    """Also the routed experts' grouped products, which are rowwise with every recipe."""

    emulate: bool = False
    """Round to float8 and multiply in high precision: the recipe's numbers on any device, slowly; for tests."""
