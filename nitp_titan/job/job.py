"""A checked job: every table with its values, and where each comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nitp_titan.float8.config import Float8Config
from nitp_titan.job.errors import Problem
from nitp_titan.job.layout import Layout
from nitp_titan.job.model_facts import ModelFacts
from nitp_titan.job.shape import shape_of
from nitp_titan.models.flavors import Shape
from nitp_titan.nitp.config import NITPConfig

Table = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that has passed every check. ``job["training"]["steps"]`` reads a value."""

    file: str
    """Path of the job file, as it was given."""
    tables: Mapping[str, Table]
    """Table -> key -> value, defaults included; a nested table is ``"validator.dataloader"``."""
    sources: Mapping[str, Mapping[str, str]]
    """Table -> key -> "command line", "file", "flavor", "nitp_titan" or "upstream"."""
    overrides: tuple[str, ...]
    """The command line's words."""
    layout: Layout
    model: ModelFacts | None
    """None for a model that only an import can tell of, while it has not been imported."""
    notes: tuple[str, ...]
    """What was decided for the user, and then the doubts, one line each."""
    warnings: tuple[Problem, ...]
    doubts: tuple[str, ...] = ()
    """What the user has set and is ignored, or contradicts itself: the last of the notes."""

    def __getitem__(self, table: str) -> Table:
        return self.tables[table]

    @property
    def nitp(self) -> NITPConfig:
        """The ``[nitp]`` table."""
        return NITPConfig(**self.tables["nitp"])

    @property
    def float8(self) -> Float8Config:
        """The ``[float8]`` table."""
        return Float8Config(**self.tables["float8"])

    @property
    def shape(self) -> Shape | None:
        """Shape of a model of ours, with what the job changes in its flavor's; None for any other."""
        return shape_of(self["model"]["module"], self["model"]["flavor"], self["model.shape"])

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.layout.world_size
