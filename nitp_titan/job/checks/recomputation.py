"""``[activation_checkpoint]``: what is named there is there."""

from __future__ import annotations

from collections.abc import Iterator

from nitp_titan.float8.layers import in_no_name, layers_of_shape
from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote
from nitp_titan.job.shape import shape_of_draft
from nitp_titan.nitp.config import NITPConfig

_TABLE, _FQNS = "activation_checkpoint", "force_recompute_mm_shapes_by_fqns"


def check_determinism(draft: Draft) -> Iterator[Problem]:
    """What torch.utils.checkpoint compares a recomputed tensor by has a name that it knows."""
    found = draft.get(_TABLE, "determinism_check")
    if found not in ("default", "none"):
        yield draft.problem(_TABLE, "determinism_check", f'found {quote(found)}, expected "default" or "none"')


def check_recomputed_layers(draft: Draft) -> Iterator[Problem]:
    """Layers whose products are computed again are there, and linear ones, in a model of ours.

    TorchTitan (``SelectiveAC``) passes over names that match nothing, and stops at one that matches another module.
    """
    if draft.get(_TABLE, "mode") != "selective" or not draft.is_written(_TABLE, _FQNS):
        return
    shape = shape_of_draft(draft)
    if shape is None:
        return
    names = [layer.name for layer in layers_of_shape(shape, NITPConfig()) if layer.name.startswith("layers.")]
    words = draft.get(_TABLE, _FQNS)
    for word, near in in_no_name(words, names):
        message = f"found {quote(word)}, which is in no linear layer's name of a block"
        yield draft.problem(_TABLE, _FQNS, message, f'did you mean "{near}"?' if near else "")
    for word in words:
        if any(word in name.rpartition(".")[0] for name in names):
            yield draft.problem(_TABLE, _FQNS, f"found {quote(word)}, which names other modules than linear layers too")


CHECKS = (check_determinism, check_recomputed_layers)
