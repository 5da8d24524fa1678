"""``[loss]`` against NITP, the sequence and torch."""

from __future__ import annotations

from collections.abc import Iterator

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote
from nitp_titan.job.loss_name import loss_name
from nitp_titan.runtime import machine


def check_loss(draft: Draft) -> Iterator[Problem]:
    """NITP trains with its own loss, and only NITP does."""
    name, nitp = draft.get("loss", "name"), draft.get("nitp", "enable")
    if nitp and name not in ("auto", "linear_cross_entropy"):
        yield draft.problem(
            "loss", "name", f'found {quote(name)}, expected "auto" or "linear_cross_entropy" with nitp.enable = true'
        )
    if not nitp and name == "linear_cross_entropy":
        yield draft.problem(
            "loss",
            "name",
            'found "linear_cross_entropy", which is for nitp.enable = true: without NITP a run is stock TorchTitan',
            'expected "auto", "chunked_cross_entropy" or "cross_entropy"',
        )
    if not nitp and name == "chunked_cross_entropy" and machine.torch_version() < (2, 13):
        found = ".".join(map(str, machine.torch_version()))
        yield draft.problem(
            "loss",
            "name",
            f'"chunked_cross_entropy" needs torch >= 2.13, found torch {found}',
            'install a newer torch, or set name = "cross_entropy"',
        )


def check_loss_chunks(draft: Draft) -> Iterator[Problem]:
    """The chunked loss splits a rank's part of the sequence into equal parts."""
    if loss_name(draft.get("loss", "name"), draft.get("nitp", "enable")) != "chunked_cross_entropy":
        return
    chunks, seq_len = draft.get("loss", "num_chunks"), draft.get("training", "seq_len")
    context = draft.get("parallelism", "context_parallel_degree")
    if chunks > 0 and context > 0 and seq_len % (chunks * context):
        each = f"loss.num_chunks {chunks}" + (f" x context_parallel_degree {context}" if context > 1 else "")
        yield draft.problem("training", "seq_len", f"found {seq_len}, expected a multiple of {each}")
