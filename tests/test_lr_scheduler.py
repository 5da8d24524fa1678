"""The exponential decay against its formula, and TorchTitan's curves through our class."""

from itertools import pairwise

import pytest
import torch
from torchtitan.components.optimizer import LRSchedulersContainer as Upstream

from nitp_titan.lr_scheduler import LRSchedulersContainer


class Optimizers(list):
    """As much of an OptimizersContainer as a scheduler wants."""


def rates(config: Upstream.Config, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedulers = config.build(optimizers=Optimizers([optimizer]), training_steps=steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedulers.step()
    return found


def test_exponential_falls_by_a_constant_factor_to_the_lowest_rate():
    config = LRSchedulersContainer.Config(warmup_steps=10, decay_ratio=0.2, decay_type="exponential", min_lr_factor=0.1)
    found = rates(config, 100)
    linear = rates(Upstream.Config(warmup_steps=10, decay_ratio=0.2, decay_type="linear"), 100)
    assert found[:81] == linear[:81]
    factors = [b / a for a, b in pairwise(found[81:])]
    assert factors == pytest.approx([factors[0]] * len(factors))
    progress = [1 - rate / 2.0 for rate in linear[81:]]
    assert found[81:] == pytest.approx([2.0 * 0.1**p for p in progress])
    assert 0.2 <= found[-1] < 0.25


@pytest.mark.parametrize("decay_type", ["linear", "sqrt", "cosine"])
def test_other_curves_are_torchtitans(decay_type):
    options = {"warmup_steps": 5, "decay_ratio": 0.5, "decay_type": decay_type, "min_lr_factor": 0.2}
    assert rates(LRSchedulersContainer.Config(**options), 40) == rates(Upstream.Config(**options), 40)


@pytest.mark.parametrize("lowest", [0.0, -0.1, 1.5])
def test_exponential_needs_a_lowest_rate(lowest):
    with pytest.raises(ValueError, match="min_lr_factor: found"):
        LRSchedulersContainer.Config(decay_type="exponential", min_lr_factor=lowest)
