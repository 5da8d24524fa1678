"""Which next-token loss a job trains with."""

from __future__ import annotations

from nitp_titan.runtime import machine


def loss_name(name: str, nitp: bool) -> str:
    """Return the loss that "auto" stands for on this torch."""
    if name != "auto":
        return name
    if nitp:
        return "linear_cross_entropy"
    # Upstream's chunked loss fails on older torch: FSDP takes the unembedding's weight away between its chunks.
    return "chunked_cross_entropy" if machine.torch_version() >= (2, 13) else "cross_entropy"
