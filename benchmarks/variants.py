"""The variants of a training step: a name, a trainer, and what it overrides in the job.

Free of torch, so that a wrong name is told at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

TrainerKind = Literal["nitp_titan", "torchtitan", "mtp"]

BASELINE = "ntp"
"""What overheads are over."""

NEVER = 10**9
"""A step that no benchmark comes to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to run the job's training step."""

    name: str
    trainer: TrainerKind
    """"nitp_titan": ours. "torchtitan": upstream's own (``stock.py``). "mtp": an MTP-1 head (``mtp.py``)."""
    overrides: tuple[str, ...] = ()
    """``--table.key=value`` words; they win over the job file and the command line."""
    meaning: str = ""


_TABLE = (
    Variant(
        name="ntp",
        trainer="nitp_titan",
        overrides=("--nitp.no-enable",),
        meaning="our trainer with nitp.enable = false: TorchTitan's model and loss",
    ),
    Variant(
        name="nitp",
        trainer="nitp_titan",
        overrides=("--nitp.enable",),
        meaning="our trainer with NITP",
    ),
    Variant(
        name="ntp_joint",
        trainer="nitp_titan",
        overrides=("--nitp.enable", f"--nitp.start_step={NEVER}"),
        meaning="NITP's model and loss before nitp.start_step: our cross-entropy, without the NITP term",
    ),
    Variant(
        name="mtp",
        trainer="mtp",
        overrides=("--nitp.no-enable",),
        meaning="one multi-token-prediction head in NITP's place, with our cross-entropy",
    ),
    Variant(
        name="stock",
        trainer="torchtitan",
        overrides=("--nitp.no-enable",),
        meaning="TorchTitan's own trainer, model and loss",
    ),
)
VARIANTS = {variant.name: variant for variant in _TABLE}


def parse_variant(text: str) -> Variant:
    """Read ``NAME:key=value,...`` of the command line: a variant that differs from "nitp", or from another, in keys.

    Keys are a job's (``float8.recipe``); ``like=NAME`` names another variant to differ from. A value may have commas.

    Raises:
        ValueError: it is not of this form; the message says what was expected.
    """
    name, colon, rest = text.partition(":")
    pairs = re.split(r",(?=\s*[A-Za-z_][\w.]*=)", rest) if rest.strip() else []
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name) or not colon or not all("=" in pair for pair in pairs):
        raise ValueError(f"--variant: found {text!r}, expected NAME:key=value,...")
    values = {key.strip(): value.strip() for key, _, value in (pair.partition("=") for pair in pairs)}
    like = _known(values.pop("like", "nitp"))
    if without_table := [key for key in values if "." not in key]:
        raise ValueError(f"--variant {name}: found key {without_table[0]!r}, expected table.key, or like=NAME")
    changes = tuple(f"--{key}={value}" for key, value in values.items())
    meaning = f"{like.name} with {', '.join(word.removeprefix('--') for word in changes)}" if changes else like.meaning
    return Variant(name=name, trainer=like.trainer, overrides=(*like.overrides, *changes), meaning=meaning)


def choose(names: Iterable[str], more: Iterable[str] = ()) -> list[Variant]:
    """Return the variants of a command line, in its order.

    Args:
        names: of ``VARIANTS``.
        more: ``NAME:key=value,...`` each.

    Raises:
        ValueError: an unknown name, one that stands twice, or none at all.
    """
    chosen = [_known(name) for name in names] + [parse_variant(text) for text in more]
    twice = {variant.name for i, variant in enumerate(chosen) if variant.name in {v.name for v in chosen[:i]}}
    if twice:
        raise ValueError(f"variants: found {', '.join(sorted(twice))} twice")
    if not chosen:
        raise ValueError(f"variants: found none, expected some of {', '.join(VARIANTS)}")
    return chosen


def _known(name: str) -> Variant:
    if name not in VARIANTS:
        raise ValueError(f"variant: found {name!r}, expected one of {', '.join(VARIANTS)}, or --variant NAME:key=value")
    return VARIANTS[name]
