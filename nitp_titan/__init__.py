"""nitp_titan: Next Implicit Token Prediction (arXiv 2605.24956) for LLM pre-training, on TorchTitan.

The names below are loaded when they are asked for, so that importing the package takes no time. All but the last two
are plain torch: they do not import TorchTitan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nitp_titan.nitp.config import NITPConfig
    from nitp_titan.nitp.geometry import effective_rank, mean_cosine_similarity
    from nitp_titan.nitp.objective import Projector, next_token_mask, nitp_loss, pair_mask, shift_left
    from nitp_titan.runtime import prepare
    from nitp_titan.titan.spec import nitp_model_spec

__version__ = "0.1.0"

_PLACES = {
    "NITPConfig": "nitp.config",
    "Projector": "nitp.objective",
    "nitp_loss": "nitp.objective",
    "next_token_mask": "nitp.objective",
    "pair_mask": "nitp.objective",
    "shift_left": "nitp.objective",
    "effective_rank": "nitp.geometry",
    "mean_cosine_similarity": "nitp.geometry",
    "nitp_model_spec": "titan.spec",
    "prepare": "runtime",
}
"""Public name -> the module that has it."""

__all__ = [
    "NITPConfig",
    "Projector",
    "effective_rank",
    "mean_cosine_similarity",
    "next_token_mask",
    "nitp_loss",
    "nitp_model_spec",
    "pair_mask",
    "prepare",
    "shift_left",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
