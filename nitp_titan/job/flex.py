"""``[model.flex_kernel_options]`` against the attention that reads it."""

from __future__ import annotations

from collections.abc import Iterator

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote
from nitp_titan.job.shape import changes_of
from nitp_titan.models.flex_options import problems

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
    for key, message in problems(options):
        yield draft.problem(TABLE, key, message)


CHECKS = (check_flex_options,)
