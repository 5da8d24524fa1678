"""A training checkpoint on disk, found and read without a trainer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nitp_titan.checkpoints.find import reason_against
from nitp_titan.checkpoints.fit import Misfit
from nitp_titan.checkpoints.reader import SafePlanner, SafeReader
from nitp_titan.nitp.config import PROJECTOR_PREFIX
from nitp_titan.runs.steps import complete_steps, is_complete


class ExportError(ValueError):
    """Nothing was written. ``problems`` holds what was found; ``str()`` is one line for each."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def find_checkpoint(path: Path, folder: str = "checkpoint") -> Path:
    """Return the checkpoint that a path means: itself, or the latest complete step in it or in its ``folder``.

    Raises:
        ExportError: there is none.
    """
    if not path.is_dir():
        raise ExportError(f"{path} is not a folder")
    if is_complete(path):
        return path
    for place in (path, path / folder):
        if steps := complete_steps(place):
            return place / f"step-{steps[-1]}"
    if re.fullmatch(r"step-\d+", path.name):
        if any(path.glob("*.safetensors")):
            raise ExportError(f"{path} is in Hugging Face format already (checkpoint.last_save_in_hf)")
        others = ", ".join(f"step-{step}" for step in complete_steps(path.parent))
        hint = f"; complete beside it: {others}" if others else ""
        raise ExportError(f"{path} is incomplete: it has no .metadata, which is written last{hint}")
    raise ExportError(f"{path} has no complete checkpoint: no step-N with a .metadata, here or in {folder}")


class Checkpoint:
    """The tensors of a training checkpoint, read when they are asked for.

    Raises:
        ExportError: the checkpoint cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reader = SafeReader(folder)
        if reason := reason_against(folder, checksums=True):
            raise ExportError(f"{folder} cannot be read: {reason}")
        self.entries = self.reader.read_metadata().state_dict_metadata

    def problems(self, model: dict[str, torch.Tensor]) -> list[str]:
        """Return in what the checkpoint differs from a model's state dict; the projector is not looked at."""
        entries = {name: entry for name, entry in self.entries.items() if not name.startswith(PROJECTOR_PREFIX)}
        return [f"{self.folder} {sentence}" for sentence in Misfit.of(entries, model).sentences()]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        entry = self.entries[name]
        assert isinstance(entry, TensorStorageMetadata)
        return entry.properties.dtype

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return tensors, whole and on the CPU."""
        tensors = {name: torch.empty(self.entries[name].size, dtype=self.dtype(name)) for name in names}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load(tensors, storage_reader=self.reader, planner=SafePlanner(), no_dist=True)
        except (Exception, dcp.CheckpointException) as error:  # the latter is a BaseException
            raise ExportError(f"{self.folder} cannot be read: {type(error).__name__}: {error}") from error
        return tensors
