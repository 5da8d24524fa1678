"""What is resumed, in one block of the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nitp_titan.checkpoints.random_state import ANEW, RANDOM_STATE, RandomState
from nitp_titan.data.loader import TextDataLoader

if TYPE_CHECKING:
    from nitp_titan.training.trainer import NITPTrainer


def block(trainer: NITPTrainer, changes: Sequence[str]) -> str:
    """Return the lines for a trainer that has loaded a checkpoint and not yet trained.

    Args:
        changes: each setting that differs from the run's before, in words.
    """
    tokens, steps = trainer.tokens_seen, trainer.config.training.steps
    lines = [f"Resumed at step {trainer.step:,} of {steps:,}, {tokens:,} tokens seen{_in_brackets(trainer)}"]
    lines += [f"data: {_position(trainer)}", f"learning rate of step {trainer.step + 1:,}: {_rates(trainer)}"]
    lines.append(f"random state: {_random_state(trainer)}")
    lines.append("settings: as before" if not changes else "settings that differ:")
    return "\n  ".join(lines + [f"  {change}" for change in changes])


def _in_brackets(trainer: NITPTrainer) -> str:
    return f" ({trainer.tokens_remark})" if trainer.tokens_remark else ""


def _position(trainer: NITPTrainer) -> str:
    if not isinstance(trainer.dataloader, TextDataLoader):
        return "as its loader has saved it"
    afresh = "dataloader" in trainer.config.checkpoint.exclude_from_loading
    return trainer.dataloader.position() + ", since checkpoint.exclude_from_loading starts them afresh" * afresh


def _rates(trainer: NITPTrainer) -> str:
    rates = dict.fromkeys(rate for scheduler in trainer.lr_schedulers for rate in scheduler.get_last_lr())
    return ", ".join(f"{rate:.6g}" for rate in rates)


def _random_state(trainer: NITPTrainer) -> str:
    state = trainer.checkpointer.states.get(RANDOM_STATE)
    if RANDOM_STATE in trainer.config.checkpoint.exclude_from_loading or not isinstance(state, RandomState):
        return f"left out, as checkpoint.exclude_from_loading says; {ANEW}"
    return state.outcome
