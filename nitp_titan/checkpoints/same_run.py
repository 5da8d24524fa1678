"""Whether a checkpoint is of this run, before any of it is read; and what of it is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpointer.base import DATALOADER, OPTIMIZER, TRAIN_STATE
from torchtitan.tools.logging import logger

from nitp_titan.checkpoints.fingerprint import Fingerprint, differences, refusals
from nitp_titan.checkpoints.fit import Misfit
from nitp_titan.checkpoints.random_state import RANDOM_STATE
from nitp_titan.checkpoints.ranks import is_first_rank, of_every_rank, of_first_rank
from nitp_titan.checkpoints.tokens_seen import TOKENS_SEEN
from nitp_titan.data.loader import ADDED_LATER
from nitp_titan.job.errors import JobError, Problem
from nitp_titan.nitp.config import PROJECTOR_PREFIX
from nitp_titan.runs.manifest import WEIGHTS_ALONE, Manifest, ManifestError


def refusal(checkpoint: Any, message: str) -> JobError:
    """Return the error that refuses a checkpoint."""
    return JobError([Problem(str(checkpoint), "", message)])


def check(state_dict: dict[str, Any], stored: dict[str, Any], checkpoint_id: str) -> None:
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
        wrong.append(WEIGHTS_ALONE)
    wrong += _other_data(state_dict.get(DATALOADER), stored)
    if wrong:
        raise refusal(checkpoint_id, "; it ".join(wrong))
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


def as_the_same_run(
    folder: Path,
    state_dict: dict[str, Any],
    fingerprint: Fingerprint,
    allowed: Collection[str],
    said_elsewhere: Collection[str],
) -> dict[str, Any]:
    """Compare what the run was; return the state without the data's where these start afresh.

    A run that takes another's weights alone is a run of its own.

    Args:
        fingerprint: what the run is.
        allowed: what may differ (``checkpoint.allow_changes``).
        said_elsewhere: keys of which it need not be said that they differ.

    Raises:
        JobError: something else differs that may not.
    """
    if TRAIN_STATE not in state_dict:
        return state_dict
    manifest = None
    # It was verified before, where it is one that is.
    with contextlib.suppress(ManifestError):
        manifest = Manifest.read(folder) if is_first_rank() else None
    then: Fingerprint = of_first_rank(dict(manifest.fingerprint) if manifest else {})
    found = differences(then, of_first_rank(fingerprint))
    if sentences := refusals(found, {*allowed, *(("data",) if DATALOADER not in state_dict else ())}):
        raise refusal(folder, "; it ".join(sentences))
    for one in found:
        if one.key not in said_elsewhere:
            logger.warning(f"Goes on from {folder.name} with other {one.group}: {one}")
    if DATALOADER in state_dict and any(one.group == "data" for one in found):
        logger.warning("The data start afresh, since they are other data")
        return {key: value for key, value in state_dict.items() if key != DATALOADER}
    return state_dict


class _Part(Stateful):
    """A part of another's state: what is left out is neither asked of the checkpoint nor set."""

    def __init__(self, whole: Stateful, left_out: set[str]):
        self._whole, self._left_out = whole, left_out

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self._whole.state_dict().items() if key not in self._left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._whole.load_state_dict(state_dict)


def without_what_the_checkpoint_lacks(state_dict: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Return the state without what may be missing: a projector, optimizer state of one, and what is saved since later.

    That are parts of the loader's state and of the trainer's, and random states, which are also each rank's own.
    """
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
    if isinstance(trainer := kept.get(TRAIN_STATE), Stateful) and f"{TRAIN_STATE}.{TOKENS_SEEN}" not in stored:
        kept[TRAIN_STATE] = _Part(trainer, {TOKENS_SEEN})
    if isinstance(random_state := kept.get(RANDOM_STATE), Stateful):
        wanted = random_state.state_dict()
        # Of another size are those of another generator.
        unfit = {key for key in wanted if not _is_like(wanted[key], stored.get(f"{RANDOM_STATE}.{key}"))}
        kept[RANDOM_STATE] = _Part(random_state, unfit)
    return kept


def _is_like(tensor: torch.Tensor, entry: Any) -> bool:
    same_size = isinstance(entry, TensorStorageMetadata) and entry.size == tensor.shape
    return same_size and entry.properties.dtype == tensor.dtype
