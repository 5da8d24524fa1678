"""Checkpoints that fit the run: all of the model and nothing else, with or without NITP's projector."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torchtitan.components.checkpointer import CheckpointManager as Upstream
from torchtitan.components.checkpointer.base import MODEL, OPTIMIZER, TRAIN_STATE
from torchtitan.components.checkpointer.dcp import AsyncMode
from torchtitan.tools import filesystem
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection

from nitp_titan.checkpoints.disk import whole_or_nothing
from nitp_titan.checkpoints.find import NoWholeCheckpoint, latest_whole, reason_against, what_is_held
from nitp_titan.checkpoints.fingerprint import Fingerprint
from nitp_titan.checkpoints.fit import Misfit, a_few, in_several_files, not_read_from_hugging_face
from nitp_titan.checkpoints.folder import (
    WENT_BACK,
    clean_up,
    saving,
    set_aside,
    take_away,
    to_remove,
    went_back_already,
)
from nitp_titan.checkpoints.keys import CheckpointKeys
from nitp_titan.checkpoints.ranks import failure_of_first_rank, is_first_rank, of_every_rank, of_first_rank
from nitp_titan.checkpoints.reader import CheckpointUnreadable, SafePlanner, SafeReader, SafeRemoteReader
from nitp_titan.checkpoints.same_run import as_the_same_run, check, refusal, without_what_the_checkpoint_lacks
from nitp_titan.checkpoints.space import require_space
from nitp_titan.checkpoints.writer import WholeWriter, seal
from nitp_titan.job.errors import JobError, Problem
from nitp_titan.models.hf.architectures import hf_config
from nitp_titan.runs.manifest import NAME as MANIFEST
from nitp_titan.runs.manifest import WEIGHTS_ALONE
from nitp_titan.runs.steps import HF_INDEX, is_complete
from nitp_titan.titan.spec import backbone_config


class CheckpointManager(Upstream):
    """TorchTitan's checkpoint manager, which loads what fits the model, and refuses the rest before it reads it.

    Two runs may differ by the projector. One that gains it, from stock TorchTitan or from before ``nitp.start_step``,
    keeps its initial weights, and the optimizer starts its moments when it first has a gradient, as in a run that was
    not interrupted. One that goes on without it leaves it.

    A checkpoint is written beside its place and put there when it is whole, with the checksums of its files. A run goes
    on from the latest one that is whole, or from the one that was asked for. Nothing in it is run. Remote folders are
    TorchTitan's: written in place, not verified.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointKeys, Upstream.Config):
        def __post_init__(self) -> None:
            Upstream.Config.__post_init__(self)
            if self.keep_every < 0:
                raise ValueError(f"keep_every: found {self.keep_every}, expected 0 (none) or more")
            if self.keep_every and filesystem.is_remote(self.folder):
                raise ValueError(
                    f"keep_every: found {self.keep_every}, which does not go with the remote {self.folder}"
                )
            if self.branch_from and self.initial_load_path not in (None, self.branch_from):
                raise ValueError("branch_from and initial_load_path name two checkpoints to start from, expected one")

    before_save: Callable[[], None] | None = None
    """Called before each checkpoint is begun. An exception leaves it out."""

    after_save: Callable[[], None] | None = None
    """Called after each checkpoint that was saved, or whose saving goes on in the background."""

    after_load: Callable[[], None] | None = None
    """Called after a checkpoint was loaded, into everything that is to have it."""

    said_elsewhere: Collection[str] = ()
    """Keys of a job of which it is said elsewhere that they differ from the run's earlier start."""

    last_step = sys.maxsize
    """The step at which the run is complete."""

    fingerprint: Fingerprint = {}
    """What this run is: is saved with each checkpoint, and compared with that of one that the run goes on from."""

    def __init__(self, config: Config, **kwargs: Any):
        if config.branch_from:
            config = replace(config, initial_load_path=config.branch_from, initial_load_model_only=False)
        super().__init__(config, **kwargs)
        self._keys = config
        self._verified = -1
        """The step that was found to be whole, and is gone on from; -1 for none."""
        self._newest = -1
        """The step that was gone on from, or saved last."""
        self._being_saved = Path()
        """The checkpoint that is saved last, maybe still in the background."""

    @property
    def _local(self) -> Path | None:
        """The folder of the run's checkpoints; None for a remote one."""
        return None if filesystem.is_remote(self.folder) else Path(self.folder)

    def load(self, step: int = -1) -> bool:
        """Load a checkpoint where there is one, as TorchTitan does; return whether there was one."""
        loaded = super().load(step)
        if loaded and self.after_load is not None:
            self.after_load()
        return loaded

    def save(self, curr_step: int, last_step: bool = False) -> bool:
        """Save a checkpoint where one is due, as TorchTitan does; return whether there was one."""
        if self.before_save is not None and self._should_save(curr_step, last_step):
            self.before_save()
        saved = super().save(curr_step, last_step)
        if saved and last_step:
            self._purge_stale_checkpoints()
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
        if self._local is None or not of_first_rank(is_complete(Path(checkpoint_id))):
            if self.before_save is not None:
                self.before_save()
            states = self._flattened_model_states_sd()
            self.dcp_save(states, checkpoint_id=checkpoint_id, async_mode=AsyncMode.DISABLED)
            self._purge_stale_checkpoints()
            if self.after_save is not None:
                self.after_save()
        return True

    def _load(self, step: int = -1) -> bool:
        folder = self._local
        if folder is None:
            return super()._load(step)
        if not self.load_only:
            self._all_together(lambda: [logger.warning(line) for line in clean_up(folder)] if folder.is_dir() else None)
        if step >= 0 and not self.load_only and of_first_rank(went_back_already(folder, step)):
            # The start that has gone back is this command's own: a restart goes on from what it has saved since.
            hint = f"remove {folder / WENT_BACK} to go back once more"
            logger.warning(f"checkpoint.load_step = {step} was gone back to by an earlier start; {hint}")
            step = -1
        goes_back = step >= 0
        if step == -1:
            try:
                step = latest_whole(folder, checksums=self._keys.verify_checksums)
            except NoWholeCheckpoint as error:
                raise JobError(
                    [Problem("", "", line) for line in str(error).splitlines()]
                    + [refusal(folder, "has no whole checkpoint: move it away to start anew").problems[0]]
                ) from error
            step = -1 if step is None else step
        elif reason := reason_against(folder / f"step-{step}", checksums=self._keys.verify_checksums):
            raise refusal(folder / f"step-{step}", f"cannot be gone on from (checkpoint.load_step): {reason}")
        self._verified = step
        if step > 0 and self._is_complete_without_state(folder, step):
            return False
        loaded = super()._load(step)
        if loaded and step >= 0:
            self._newest = step
            # A run that does not go on counting its steps replaces all that there is.
            after = -1 if TRAIN_STATE in self.exclude_from_loading else step
            if not self.load_only:
                self._all_together(lambda: self._set_aside(folder, after, goes_back=goes_back))
        return loaded

    def _is_complete_without_state(self, folder: Path, step: int) -> bool:
        """Whether a run's latest checkpoint holds its weights alone, and the run had come to its end with it.

        Raises:
            JobError: it holds the weights alone, and the run is to go on.
        """
        holds, full = of_first_rank(what_is_held(folder, step) if is_first_rank() else ("", -1))
        if holds == "everything":
            return False
        if step >= self.last_step:
            self.states[TRAIN_STATE].load_state_dict({"step": step, "ntokens_seen": 0, "tokens_seen": 0})
            return True
        hint = f"; checkpoint.load_step = {full} goes back to the latest that it can go on from" if full >= 0 else ""
        raise refusal(folder / f"step-{step}", f"{WEIGHTS_ALONE}{hint}")

    def _find_load_step(self, folder: str = "") -> int:
        # What was found to be whole, not whatever has a name like one.
        return self._verified if not folder and self._local is not None else super()._find_load_step(folder)

    @staticmethod
    def _set_aside(folder: Path, step: int, *, goes_back: bool) -> None:
        if places := set_aside(folder, step, noted=goes_back):
            names = ", ".join(place.name for place in places)
            logger.warning(f"The run goes back to step-{step}: its later checkpoints are {names} now")

    def _all_together(self, work: Callable[[], Any]) -> None:
        """Have the first rank do what concerns the folder, and the others wait for it.

        Raises:
            JobError: the disk does not let it, on all ranks alike; as does any other exception of the first rank's.
        """
        error = failure_of_first_rank(work)
        if isinstance(error, OSError):
            raise refusal(self.folder, f"cannot be changed: {error.strerror or error} ({error.filename})")
        if error is not None:
            raise error

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Load a checkpoint into ``state_dict`` and the model, as TorchTitan does.

        Raises:
            JobError: the checkpoint is not whole, or is another run's, or lacks tensors of the model, or has others, or
                some of another size.
        """
        folder = None if filesystem.is_remote(checkpoint_id) else Path(checkpoint_id)
        if folder is not None:
            self._check_whole(folder, from_hf)
            allowed = self._keys.allow_changes
            state_dict = as_the_same_run(folder, state_dict, self.fingerprint, allowed, self.said_elsewhere)
        if from_hf:
            self._check_hugging_face(state_dict, Path(checkpoint_id), from_quantized)
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        if folder is not None and of_first_rank((folder / HF_INDEX).is_file()):
            start = "start from it (checkpoint.initial_load_path with initial_load_in_hf, another job.dump_folder)"
            raise refusal(folder, f"is in Hugging Face's format: a run can {start}, not go on")
        reader = SafeReader(folder) if folder is not None else SafeRemoteReader(checkpoint_id)
        try:
            stored = reader.read_metadata().state_dict_metadata
            check(state_dict, stored, checkpoint_id)
            state_dict = without_what_the_checkpoint_lacks(state_dict, stored)
            dcp.load(state_dict, storage_reader=reader, planner=SafePlanner())
        except CheckpointUnreadable as error:
            raise refusal(checkpoint_id, f"cannot be loaded: {error}") from error
        except dcp.api.CheckpointException as error:
            unreadable = [e for e in error.failures.values() if isinstance(e[0], CheckpointUnreadable)]
            if not unreadable:
                raise
            raise refusal(checkpoint_id, f"cannot be loaded: {unreadable[0][0]}") from error
        self.states[MODEL].load_state_dict(state_dict)

    def _check_whole(self, folder: Path, from_hf: bool) -> None:
        if folder == Path(self._create_checkpoint_id(self._verified)):
            return
        # Hugging Face's own folders have no manifest; what is wrong with them their reader says.
        if from_hf and of_first_rank(not (folder / MANIFEST).exists()):
            return
        if reason := reason_against(folder, checksums=self._keys.verify_checksums):
            raise refusal(folder, f"cannot be loaded: {reason}")

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """Save as TorchTitan does, beside the checkpoint's place; Hugging Face weights with the ``config.json`` that
        they are to be read with."""
        if filesystem.is_remote(checkpoint_id):
            return super().dcp_save(state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf)
        final = Path(checkpoint_id)
        step = int(final.name.removeprefix("step-"))
        self._newest = step
        self._being_saved = final
        with whole_or_nothing(final):
            require_space(state_dict, checkpoint_id)
            if to_hf:
                return self._save_hugging_face(state_dict, final, step, enable_garbage_collection)
            return self._save_whole(state_dict, final, step, async_mode, enable_garbage_collection)

    def _save_whole(self, state_dict: dict[str, Any], final: Path, step: int, mode: AsyncMode, collect: bool) -> Any:
        holds = "everything" if OPTIMIZER in state_dict else "weights"
        writer = WholeWriter(final, step=step, holds=holds, fingerprint=self.fingerprint)
        saved: Any = None
        if mode == AsyncMode.ASYNC:
            saved = dcp.async_save(state_dict, storage_writer=writer, process_group=self.pg)
        elif mode == AsyncMode.ASYNC_WITH_PINNED_MEM:
            saved = dcp.async_save(
                state_dict,
                storage_writer=writer,
                process_group=self.pg,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                async_stager=self.stager,
            )
        else:
            dcp.save(state_dict, storage_writer=writer)
        if collect:
            GarbageCollection.collect("GC collection invoked by checkpointer.")
        return saved

    def _save_hugging_face(self, state_dict: dict[str, Any], final: Path, step: int, collect: bool) -> None:
        folder = saving(final)
        self._all_together(lambda: shutil.rmtree(folder, ignore_errors=True))
        failure: BaseException | None = None
        try:
            super().dcp_save(state_dict, str(folder), AsyncMode.DISABLED, collect, to_hf=True)
        except (Exception, dcp.api.CheckpointException) as error:  # the others wait for this rank's files
            failure = error
        failed = any(of_every_rank(failure is not None))
        if failure is not None:
            raise failure
        if failed:
            raise OSError(errno.EIO, "another rank could not write its part", str(folder))

        def finish() -> None:
            self._write_hf_config(folder)
            seal(final, step=step, fingerprint=self.fingerprint)

        self._all_together(finish)

    def _purge_stale_checkpoints(self) -> None:
        if (folder := self._local) is None:
            super()._purge_stale_checkpoints()
        elif self._should_purge():
            k, every = self.keep_latest_k, self._keys.keep_every
            for step in to_remove(folder, keep_latest=k, keep_every=every, protected=[self._newest]):
                try:
                    self.purge_queue.put(str(take_away(folder, step)))
                except OSError as error:
                    # One more checkpoint than is wanted is no reason to end a run.
                    logger.warning(f"{folder / f'step-{step}'} cannot be removed: {error.strerror or error}")

    def _wait_for_saving(self) -> None:
        """Wait for the save in the background, as TorchTitan does; where it has failed, leave nothing of it."""
        if self._local is None:
            super()._wait_for_saving()
            return
        with whole_or_nothing(self._being_saved):
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
            raise refusal(folder, "is in Hugging Face format, which the job's model has no names for")
        # Again in TorchTitan's own method: it moves no weights but those that it has to turn.
        wanted = self.sd_adapter.to_hf(dict(state_dict))
        stored = self.sd_adapter.get_hf_storage_reader(str(folder), from_quantized).read_metadata().state_dict_metadata
        if twice := in_several_files(stored):
            raise refusal(folder, f"has tensors in several files, of which one is meant: {a_few(twice)}")
        left = not_read_from_hugging_face(stored, self.sd_adapter, folder)
        misfit = Misfit.of(stored, wanted).without(left.keys() - wanted.keys()).of_all_ranks()
        if wrong := misfit.sentences():
            raise refusal(folder, "; it ".join(wrong))
        for why in dict.fromkeys(left.values()):
            logger.info(f"{folder}: not read, {why}: {a_few([name for name in left if left[name] == why])}")
