"""The keys of ``[checkpoint]`` that TorchTitan has not: one definition for job files and for the manager.

Free of torch. A docstring under a key is what ``nitp-titan check --keys`` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Change = Literal["model", "tokenizer", "data", "optimizer"]
"""What a run is refused to go on with, once it differs from its checkpoint's."""


# Without slots, since the manager's configuration has TorchTitan's for another base, which has them.
@dataclass(kw_only=True)
class CheckpointKeys:
    """What is kept, trusted and gone on with. A key that is added here is one of the table and of the manager."""

    keep_every: int = 0
    """Checkpoints of steps that are a multiple of it are kept for good, beside the latest keep_latest_k. 0 = none."""

    verify_checksums: bool = True
    """Read a checkpoint's files against their checksums before it is loaded, spread over the ranks; if not, their
    sizes alone."""

    branch_from: str | None = None
    """Checkpoint of another run (RUN/step-N) that a new run goes on from in full, under its own schedule: weights,
    optimizer, data position, step. The other run stays as it is."""

    allow_changes: list[Change] = field(default_factory=list)
    """What may differ from the checkpoint that a run goes on from, and is refused otherwise: "model", "tokenizer",
    "data" (which start afresh), "optimizer"."""
