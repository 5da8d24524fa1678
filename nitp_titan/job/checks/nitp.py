"""``[nitp]`` against the model."""

from __future__ import annotations

from collections.abc import Iterator

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem
from nitp_titan.nitp.config import NITPConfig


def check_nitp(draft: Draft) -> Iterator[Problem]:
    """[nitp] is within its ranges and the model's depth."""
    values = {key: setting.value for (table, key), setting in draft.settings.items() if table == "nitp"}
    # As an object that __post_init__ has not refused.
    config = NITPConfig()
    for key, value in values.items():
        setattr(config, key, value)
    for key, message in config.problems():
        yield draft.problem("nitp", key, message)
    depth = draft.facts().n_layers
    target = draft.get("nitp", "target_layer")
    if target is not None and target > depth:
        expected = f"0..{depth} (0 = the embeddings, {depth} = the last block)"
        hint = f'"none" is a fifth of the depth, {NITPConfig().target_layer_of(depth)}'
        yield draft.problem("nitp", "target_layer", f"found {target}, expected {expected}", hint)
