"""Checkpoints of a run that gains its projector: of stock TorchTitan, or from before ``nitp.start_step``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpointer import CheckpointManager as Upstream
from torchtitan.components.checkpointer.base import OPTIMIZER
from torchtitan.tools.logging import logger

from nitp_titan.decoder import PROJECTOR_PREFIX


class CheckpointManager(Upstream):
    """TorchTitan's checkpoint manager, which also loads what has no projector or no optimizer state of one.

    The projector then keeps its initial weights, and the optimizer starts its moments when it first has a gradient,
    as in a run that was not interrupted. Anything else that is missing is TorchTitan's error.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Upstream.Config):
        pass

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Load a checkpoint into ``state_dict`` and the model, as TorchTitan does."""
        # A remote checkpoint is not looked into: TorchTitan reads it through another library.
        if not from_hf and os.path.isdir(checkpoint_id):
            state_dict = _without_what_the_checkpoint_lacks(state_dict, checkpoint_id)
        super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)


class _Part(Stateful):
    """A part of another's state: what is left out is neither asked of the checkpoint nor set."""

    def __init__(self, whole: Stateful, left_out: set[str]):
        self._whole, self._left_out = whole, left_out

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self._whole.state_dict().items() if key not in self._left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._whole.load_state_dict(state_dict)


def _without_what_the_checkpoint_lacks(state_dict: dict[str, Any], checkpoint_id: str) -> dict[str, Any]:
    stored = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
    weights = {key for key in state_dict if key.startswith(PROJECTOR_PREFIX) and key not in stored}
    if weights:
        logger.warning(f"{checkpoint_id} has no projector: NITP starts with its initial one")
    kept = {key: value for key, value in state_dict.items() if key not in weights}
    if OPTIMIZER in kept:
        # TorchTitan's names: "state.FQN.exp_avg", "param_groups.FQN.lr".
        ours = {key for key in kept[OPTIMIZER].state_dict() if f".{PROJECTOR_PREFIX}" in key}
        missing = {key for key in ours if f"{OPTIMIZER}.{key}" not in stored}
        if missing:
            kept[OPTIMIZER] = _Part(kept[OPTIMIZER], missing)
    return kept
