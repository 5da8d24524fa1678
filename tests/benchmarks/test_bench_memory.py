"""What a CPU is said to have used, against work whose allocations are known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import usage_of

MIB = 2**20


def mebibytes(n: int) -> torch.Tensor:
    return torch.empty(n * MIB, dtype=torch.uint8)


def test_peak_and_what_is_kept():
    def work() -> torch.Tensor:
        a = mebibytes(3)
        b = mebibytes(4)
        del a
        c = mebibytes(2)  # noqa: F841
        return b

    assert usage_of(work, "cpu") == (7 * MIB, 4 * MIB)


def test_what_was_there_before_does_not_count():
    before = mebibytes(64)
    assert usage_of(lambda: before.add_(1), "cpu").peak < MIB


def test_storages_that_grow_and_shrink_count():
    """FSDP frees and takes the memory of gathered weights in this way."""
    storage = mebibytes(0).untyped_storage()

    def work() -> None:
        storage.resize_(5 * MIB)
        storage.resize_(0)

    assert usage_of(work, "cpu") == (5 * MIB, 0)


def test_backward_counts():
    x = torch.zeros(MIB, requires_grad=True)  # 4 MiB

    def work() -> None:
        (x * 2).square().sum().backward()

    # x * 2 and its square; then the latter is gone, and the gradients of both products come one after the other.
    usage = usage_of(work, "cpu")
    assert usage.kept == pytest.approx(4 * MIB, abs=MIB / 8)
    assert 8 * MIB <= usage.peak <= 16.1 * MIB
