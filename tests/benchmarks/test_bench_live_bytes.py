"""Live bytes against tensors whose sizes are known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.live_bytes import LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_count_once_while_they_live(device):
    known = torch.zeros(1000, device=device)
    with LiveBytes([known]) as live:
        a = torch.zeros(10, device=device)
        view = a.view(5, 2)
        known.view(10, 100).add_(1)
        assert live.now == 40
        del a
        assert live.now == 40
        b = known[:20] * 2
        del view
        assert (live.now, live.peak) == (80, 120)
        del b
    assert (live.now, live.peak) == (0, 120)


def test_backward_passes_count():
    x = torch.zeros(100, device="meta", requires_grad=True)
    with LiveBytes([x]) as live:
        total = (x * 2).square().sum()
        assert (live.now, live.peak) == (404, 804)  # x * 2, which the square keeps, and the sum
        del total
        x.square().sum().backward()
    assert live.now == 400  # the gradient
