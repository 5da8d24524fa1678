"""Whether the tensors of a checkpoint are a model's, by name and size, both ways; before any of them is read."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpointer.base import DATALOADER, LR_SCHEDULER, OPTIMIZER, TRAIN_STATE

from nitp_titan.checkpoints.random_state import RANDOM_STATE
from nitp_titan.checkpoints.ranks import of_every_rank

TRAINER_STATES = (DATALOADER, LR_SCHEDULER, OPTIMIZER, RANDOM_STATE, TRAIN_STATE)
"""What a training checkpoint holds besides the model: the first part of its names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """In what a checkpoint's tensors differ from a model's."""

    missing: tuple[str, ...]
    """The model's, not in the checkpoint."""
    extra: tuple[str, ...]
    """The checkpoint's, not in the model."""
    resized: tuple[str, ...]
    """In both, of other sizes: the name and the two sizes."""

    @classmethod
    def of(cls, stored: Mapping[str, Any], wanted: Mapping[str, torch.Tensor]) -> Misfit:
        """Compare.

        Args:
            stored: name -> metadata of torch's distributed checkpoints.
            wanted: name -> tensor of the model, or of this rank's part of it.
        """
        extra = [name for name in stored if name not in wanted and name.partition(".")[0] not in TRAINER_STATES]
        sizes = [(name, _size_of(stored[name]), tensor.shape) for name, tensor in wanted.items() if name in stored]
        return cls(
            missing=tuple(name for name in wanted if name not in stored),
            extra=tuple(extra),
            resized=tuple(f"{name} {_size(here)}, not {_size(model)}" for name, here, model in sizes if here != model),
        )

    def without(self, names: Collection[str]) -> Misfit:
        """Return the same without tensors whose absence on one side is known and right."""
        return Misfit(
            missing=tuple(name for name in self.missing if name not in names),
            extra=tuple(name for name in self.extra if name not in names),
            resized=self.resized,
        )

    def of_all_ranks(self) -> Misfit:
        """Return what all ranks find together, each of which may have a part of the model: the same on every one."""
        parts = of_every_rank(self)
        nobodys = set(self.extra).intersection(*(part.extra for part in parts))
        return Misfit(
            missing=_union(part.missing for part in parts),
            extra=tuple(name for name in self.extra if name in nobodys),
            resized=_union(part.resized for part in parts),
        )

    def sentences(self) -> list[str]:
        """Return what is wrong, with some of the names; empty where nothing is."""
        found = {
            "lacks tensors": self.missing,
            "has tensors too many": self.extra,
            "has tensors of other sizes": self.resized,
        }
        return [f"{what} for the job's model: {a_few(names)}" for what, names in found.items() if names]


def not_read_from_hugging_face(stored: Iterable[str], adapter: Any, folder: Path) -> dict[str, str]:
    """Return the tensors of a Hugging Face folder that no decoder needs -> why; transformers leaves them, too.

    Args:
        stored: names of the folder's tensors.
        adapter: TorchTitan's, from these names to the model's.
        folder: it may have a ``config.json``.
    """
    names: dict[str, str | None] = getattr(adapter, "from_hf_map", {})
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    depth = len(adapter.model_config.layers)
    heads = config.get("num_nextn_predict_layers") or 0
    found = {}
    for name in stored:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if names.get(re.sub(r"\d+", "{}", name, count=1), name) is None:
            found[name] = "a buffer that is computed"
        elif name == "lm_head.weight" and adapter.model_config.enable_weight_tying:
            found[name] = "the embedding is tied"
        elif name.endswith("_scale_inv") and config.get("quantization_config"):
            found[name] = "a scale of quantized weights"
        elif name.startswith("model.mtp_") or (layer and depth <= int(layer[1]) < depth + heads):
            found[name] = "a multi-token-prediction head"
    return found


def in_several_files(stored: Mapping[str, Any]) -> list[str]:
    """Return the tensors of which a Hugging Face folder has several versions, one of which would be read."""
    entries = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    return [
        name for name, entry in entries.items() if len({chunk.offsets for chunk in entry.chunks}) < len(entry.chunks)
    ]


def a_few(names: Collection[str], limit: int = 3) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(list(names)[:limit]) + more


def _union(parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part))


def _size_of(entry: Any) -> torch.Size | None:
    return getattr(entry, "size", None)


def _size(size: Iterable[int] | None) -> str:
    return "x".join(map(str, size)) if size is not None else "no tensor"
