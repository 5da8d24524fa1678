"""The ``[nitp]`` table of a job: what NITP does in a run.

Free of torch, so that a job file is checked without the seconds that importing torch takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

REGULARISER = "generic_cosine"
"""The baseline that has no target and no projector: it spreads the hidden states of a sequence apart."""

LOSS_KINDS: dict[str, int] = {"cosine": 24, "mse": 16, "smooth_l1": 16, "kl": 32, REGULARISER: 24}
"""``nitp.loss`` -> bytes a token and feature that it takes at its peak, beyond the projector (measured).

A new kind is an entry here and its distance in ``objective.DISTANCES``.
"""

if TYPE_CHECKING:
    LossKind = str
else:
    LossKind = Literal[tuple(LOSS_KINDS)]
ProjectorKind = Literal["swiglu", "none"]
Shift = Literal[0, 1]

CHUNK_TOKENS = 4096
"""Tokens whose logits exist at a time, unless ``[loss]`` says otherwise.

C of them give the unembedding's weight a gradient by 2 C V d FLOPs, for which C V logits' gradients in bf16 are read,
and V d numbers in fp32 read and written: at d = 896, 478 FLOPs a byte. An H100 does 295 while it moves one; 2,048
tokens, with 326, would be at the edge of that.
"""


@dataclass(kw_only=True, slots=True)
class NITPConfig:
    """Options of Next Implicit Token Prediction (paper section 3; ablations: section 4).

    Raises:
        ValueError: a value outside its range; the message names every such key.
    """

    enable: bool = True
    """Train with NITP. Off, the run is stock TorchTitan's, bit for bit."""

    weight: float = 1.0
    """Lambda of NTP + lambda * NITP (paper eq. 4); the paper has 1.0 for small models and 0.8 to 0.6 for large ones."""

    target_layer: int | None = None
    """Whose output is the implicit token: 0 = the embeddings, k = block k. Unset: a fifth of the depth, at least 1."""

    projector: ProjectorKind = "swiglu"
    """What maps the last hidden state to its prediction; "none" compares the hidden state itself (ablation)."""

    projector_ratio: int = 4
    """Hidden width of the projector over the model's: ratio * d."""

    loss: LossKind = "cosine"
    """Distance of prediction and target. "generic_cosine" is the regulariser baseline: it has no target."""

    shift: Shift = 1
    """1: the target is the next token's state; 0: the same position's (ablation)."""

    stop_gradient: bool = True
    """Whether the target is a constant of the backward pass."""

    start_step: int = 0
    """First step with NITP. Before it the branch is not computed and the projector does not change."""

    geometry_freq: int = 100
    """Steps between geometry metrics (effective rank, mean cosine similarity); 0 = off."""

    @property
    def has_target(self) -> bool:
        """Whether the loss compares a prediction with a target, as all but the regulariser do."""
        return self.loss != REGULARISER

    def __post_init__(self) -> None:
        problems = [f"nitp.{key}: {message}" for key, message in self.problems()]
        if problems:
            raise ValueError("; ".join(problems))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) for every value outside its range."""
        for key, choices in (("projector", ProjectorKind), ("loss", LossKind), ("shift", Shift)):
            value = getattr(self, key)
            if value not in get_args(choices):
                yield key, f"found {value!r}, expected one of {', '.join(map(repr, get_args(choices)))}"
        if not (math.isfinite(self.weight) and self.weight >= 0):
            yield "weight", f"found {self.weight}, expected a finite number of at least 0"
        if self.target_layer is not None and self.target_layer < 0:
            yield "target_layer", f"found {self.target_layer}, expected 0 (the embeddings) or the number of a block"
        for key, lowest in (("projector_ratio", 1), ("start_step", 0), ("geometry_freq", 0)):
            value = getattr(self, key)
            if value < lowest:
                yield key, f"found {value}, expected at least {lowest}"

    def target_layer_of(self, n_layers: int) -> int:
        """Return the target layer for a model of ``n_layers`` blocks.

        Raises:
            ValueError: the target layer lies beyond the model's depth.
        """
        if self.target_layer is None:
            return max(1, round(n_layers / 5))
        if self.target_layer > n_layers:
            raise ValueError(
                f"nitp.target_layer: found {self.target_layer}, expected 0..{n_layers} (the model's depth)"
            )
        return self.target_layer

    def projector_tokens(self, chunk_tokens: int, *, dim: int, vocab_size: int) -> int:
        """Return how many tokens the projector takes at a time: as many as need no more memory than a chunk's logits.

        In numbers of the compute dtype a token has, at the least, its logits and their gradient, 2 V; in the projector
        gate, up, their product and the three gradients, 6 ratio d, and in the loss prediction, target and a gradient in
        fp32, 12 d. Larger products are faster, so it is not less than ``chunk_tokens``.

        Args:
            chunk_tokens: tokens whose logits exist at a time.
            dim: the model's.
            vocab_size: the model's.
        """
        ratio = self.projector_ratio if self.projector == "swiglu" else 0
        return max(chunk_tokens, chunk_tokens * 2 * vocab_size // ((6 * ratio + 12) * dim))


def has_projector(nitp: NITPConfig) -> bool:
    """Whether training has a projector."""
    return nitp.enable and nitp.projector == "swiglu" and nitp.has_target


def projector_params(dim: int, nitp: NITPConfig) -> int:
    """Return the projector's parameters: two matrices d x ratio d, one ratio d x d."""
    return 3 * nitp.projector_ratio * dim**2 if has_projector(nitp) else 0


PROJECTOR_PREFIX = "projector."
"""How the names of the projector's parameters begin: ``projector.w1.weight`` and so on."""
