"""``[model.flex_kernel_options]`` against the attention that reads it."""

from __future__ import annotations

from collections.abc import Iterator

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote
from nitp_titan.job.shape import changes_of, shape_of_draft
from nitp_titan.models.flex_options import default_options, problems

TABLE = "model.flex_kernel_options"


def check_flex_options(draft: Draft) -> Iterator[Problem]:
    """Options are of a kernel that the job runs, and ones that it can have."""
    options = changes_of(draft.table(TABLE))
    backend = draft.get("model", "attn_backend")
    if backend != "flex":
        for key, value in options.items():
            message = f'found {value}, which is for attn_backend "flex", not {quote(backend)}'
            yield draft.problem(TABLE, key, message, 'remove it, or set it to "none"')
        return
    shape = shape_of_draft(draft)
    own = default_options(shape.head_dim) if shape else {}
    for key, message in problems(own | options) if options else ():
        # A pair is wrong by the one that the job sets.
        culprit = key if key in options else next(iter(options))
        yield draft.problem(TABLE, culprit, message if key in options else f"with which {key} is wrong: {message}")


CHECKS = (check_flex_options,)
