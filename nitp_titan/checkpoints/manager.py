"""Checkpoints that fit the run: all of the model and nothing else, with or without NITP's projector."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpointer import CheckpointManager as Upstream
from torchtitan.components.checkpointer.base import DATALOADER, MODEL, OPTIMIZER
from torchtitan.components.checkpointer.dcp import AsyncMode
from torchtitan.tools.logging import logger

from nitp_titan.checkpoints.disk import saving
from nitp_titan.checkpoints.fit import Misfit, a_few, in_several_files, not_read_from_hugging_face, of_every_rank
from nitp_titan.checkpoints.space import require_space
from nitp_titan.data.loader import ADDED_LATER
from nitp_titan.job.errors import JobError, Problem
from nitp_titan.models.hf.architectures import hf_config
from nitp_titan.nitp.config import PROJECTOR_PREFIX
from nitp_titan.runs.steps import is_complete
from nitp_titan.titan.spec import backbone_config


class CheckpointManager(Upstream):
    """TorchTitan's checkpoint manager, which loads what fits the model, and refuses the rest before it reads it.

    Two runs may differ by the projector. One that gains it, from stock TorchTitan or from before ``nitp.start_step``,
    keeps its initial weights, and the optimizer starts its moments when it first has a gradient, as in a run that was
    not interrupted. One that goes on without it leaves it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Upstream.Config):
        pass

    after_save: Callable[[], None] | None = None
    """Called after each checkpoint that was saved, or whose saving goes on in the background."""

    def save(self, curr_step: int, last_step: bool = False) -> bool:
        """Save a checkpoint where one is due, as TorchTitan does; return whether there was one."""
        saved = super().save(curr_step, last_step)
        if saved and self.after_save is not None:
            self.after_save()
        return saved

    def save_now(self, step: int) -> bool:
        """Save all of a step's state, whether or not a checkpoint is due, and wait for it; return whether there is one.

        There is none where the job saves none (``checkpoint.enable``, ``load_only``). One that was being saved in the
        background is waited for; one of this very step is not saved again.
        """
        if not self.enable or self.load_only:
            return False
        self.maybe_wait_for_staging()
        self.maybe_wait_for_saving()
        checkpoint_id = self._create_checkpoint_id(step)
        if not is_complete(Path(checkpoint_id)):
            states = self._flattened_model_states_sd()
            self.dcp_save(states, checkpoint_id=checkpoint_id, async_mode=AsyncMode.DISABLED)
            if self.after_save is not None:
                self.after_save()
        return True

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Load a checkpoint into ``state_dict`` and the model, as TorchTitan does.

        Raises:
            JobError: the checkpoint lacks tensors of the model, or has others, or some of another size.
        """
        if from_hf:
            self._check_hugging_face(state_dict, Path(checkpoint_id), from_quantized)
        # A remote checkpoint is not looked into: TorchTitan reads it through another library.
        elif os.path.isdir(checkpoint_id):
            stored = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
            _check(state_dict, stored, checkpoint_id)
            state_dict = without_what_the_checkpoint_lacks(state_dict, stored)
        super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """Save as TorchTitan does; Hugging Face weights with the ``config.json`` that they are to be read with."""
        self._being_saved = checkpoint_id
        with saving(checkpoint_id):
            require_space(state_dict, checkpoint_id)
            saved = super().dcp_save(state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf)
        if to_hf and (not dist.is_initialized() or dist.get_rank() == 0):
            assert self.sd_adapter is not None  # or TorchTitan has refused
            self._write_hf_config(Path(checkpoint_id))
        return saved

    def _wait_for_saving(self) -> None:
        """Wait for the save in the background, as TorchTitan does; where it has failed, leave nothing of it."""
        with saving(self._being_saved):
            super()._wait_for_saving()

    def require_space(self, step: int, steps: int) -> None:
        """Refuse a run whose next checkpoint would not fit the disk, before its first step.

        Args:
            step: the step that it goes on from.
            steps: its last one.

        Raises:
            DiskError: it does not fit.
        """
        if not self.enable or self.load_only:
            return
        only_the_last = (step // self.interval + 1) * self.interval >= steps and not self.enable_first_step_checkpoint
        state: dict[str, Any] = self._flattened_model_states_sd()
        if only_the_last and self.last_save_model_only:
            weights = {name: weight.to("meta") for name, weight in self.states[MODEL].state_dict().items()}
            state = {name: weight.to(self.export_dtype) for name, weight in weights.items()}
        require_space(state, self.folder)

    def _write_hf_config(self, folder: Path) -> None:
        try:
            values = hf_config(backbone_config(self.sd_adapter.model_config))
        except ValueError as error:
            logger.warning(f"{folder} has no config.json: {error}")
            return
        values["dtype"] = str(self.export_dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def _check_hugging_face(self, state_dict: dict[str, Any], folder: Path, from_quantized: bool) -> None:
        if self.sd_adapter is None:
            raise _refusal(folder, "is in Hugging Face format, which the job's model has no names for")
        # Again in TorchTitan's own method: it moves no weights but those that it has to turn.
        wanted = self.sd_adapter.to_hf(dict(state_dict))
        stored = self.sd_adapter.get_hf_storage_reader(str(folder), from_quantized).read_metadata().state_dict_metadata
        if twice := in_several_files(stored):
            raise _refusal(folder, f"has tensors in several files, of which one is meant: {a_few(twice)}")
        left = not_read_from_hugging_face(stored, self.sd_adapter, folder)
        misfit = Misfit.of(stored, wanted).without(left.keys() - wanted.keys()).of_all_ranks()
        if wrong := misfit.sentences():
            raise _refusal(folder, "; it ".join(wrong))
        for why in dict.fromkeys(left.values()):
            logger.info(f"{folder}: not read, {why}: {a_few([name for name in left if left[name] == why])}")


def _refusal(checkpoint: Any, message: str) -> JobError:
    return JobError([Problem(str(checkpoint), "", message)])


def _check(state_dict: dict[str, Any], stored: dict[str, Any], checkpoint_id: str) -> None:
    """Refuse a training checkpoint of another model.

    Raises:
        JobError: the message names some of the tensors.
    """
    wanted = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    misfit = Misfit.of(stored, wanted).of_all_ranks()
    has_projector = any(name.startswith(PROJECTOR_PREFIX) for name in stored)
    # Under pipeline parallelism the last stage alone has a projector.
    wants_projector = any(of_every_rank(any(name.startswith(PROJECTOR_PREFIX) for name in wanted)))
    if has_projector != wants_projector:
        known = {name for name in misfit.missing + misfit.extra if name.startswith(PROJECTOR_PREFIX)}
        misfit = misfit.without(known)
    wrong = misfit.sentences()
    if OPTIMIZER in state_dict and not any(name.startswith(f"{OPTIMIZER}.") for name in stored):
        wrong.append(
            "has no optimizer state: a run can start from it (checkpoint.initial_load_path, another job.dump_folder), "
            "not go on"
        )
    wrong += _other_data(state_dict.get(DATALOADER), stored)
    if wrong:
        raise _refusal(checkpoint_id, "; it ".join(wrong))
    if wants_projector and not has_projector:
        logger.warning(f"{checkpoint_id} has no projector: NITP starts with its initial one")
    if has_projector and not wants_projector:
        logger.warning(f"{checkpoint_id} has NITP's projector, which this run does not train: it is left out")


def _other_data(loader: Any, stored: dict[str, Any]) -> list[str]:
    """Return a line where the checkpoint's data were drawn otherwise than a loader's, so that it could not be read.

    What can be read the loader compares itself.
    """
    state = loader.state_dict() if isinstance(loader, Stateful) else {}
    then, now = stored.get(f"{DATALOADER}.num_streams"), state.get("num_streams")
    if then is None or now is None:
        return []
    afresh = 'or checkpoint.exclude_from_loading = ["dataloader"] to start the data afresh'
    if tuple(then.size) != tuple(now.shape):
        numbers = f"{then.size[0]} streams of data, the job draws from {now.shape[0]}"
        usual = then.size[0] > 1
        restore = f"set dataloader.num_streams = {then.size[0]}" if usual else "set dataloader.infinite = false"
        return [f"has {numbers}: {restore}, {afresh}"]
    lacking = _lacking(state, stored).difference(ADDED_LATER)
    if lacking:
        names = ", ".join(sorted(lacking))
        return [f"has data of another kind, without {names}: restore dataloader.dataset and streaming, {afresh}"]
    return []


def _lacking(loader_state: dict[str, Any], stored: dict[str, Any]) -> set[str]:
    return {name for name in loader_state if name != "streams" and f"{DATALOADER}.{name}" not in stored}


class _Part(Stateful):
    """A part of another's state: what is left out is neither asked of the checkpoint nor set."""

    def __init__(self, whole: Stateful, left_out: set[str]):
        self._whole, self._left_out = whole, left_out

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self._whole.state_dict().items() if key not in self._left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._whole.load_state_dict(state_dict)


def without_what_the_checkpoint_lacks(state_dict: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Return the state without what may be missing: a projector, optimizer state of one, later parts of a loader's."""
    weights = {key for key in state_dict if key.startswith(PROJECTOR_PREFIX) and key not in stored}
    kept = {key: value for key, value in state_dict.items() if key not in weights}
    if OPTIMIZER in kept:
        # TorchTitan's names: "state.FQN.exp_avg", "param_groups.FQN.lr".
        ours = {key for key in kept[OPTIMIZER].state_dict() if f".{PROJECTOR_PREFIX}" in key}
        missing = {key for key in ours if f"{OPTIMIZER}.{key}" not in stored}
        if missing:
            kept[OPTIMIZER] = _Part(kept[OPTIMIZER], missing)
    if isinstance(loader := kept.get(DATALOADER), Stateful) and (missing := _lacking(loader.state_dict(), stored)):
        kept[DATALOADER] = _Part(loader, missing)
    return kept
