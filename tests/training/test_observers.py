"""What is read off a step, from modules made by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nitp_titan.nitp.geometry import effective_rank
from nitp_titan.training.hooks import Moment
from nitp_titan.training.observers import ExpertLoad, HiddenStateGeometry

ALONE = SimpleNamespace(get_optional_mesh=lambda name: None, ep_enabled=False, tp=1)


LOGGED = Moment(step=1, logged=True, model_parts=[])


def part_with_norm() -> SimpleNamespace:
    return SimpleNamespace(norm=nn.Identity())


def test_geometry_is_of_the_valid_tokens_of_all_micro_batches():
    torch.manual_seed(0)
    states = torch.randn(2, 3, 8, 5) * torch.tensor([9.0, 3.0, 1.0, 0.3, 0.1])
    valid = torch.rand(2, 3, 8) > 0.4
    geometry, part = HiddenStateGeometry(ALONE), part_with_norm()
    with geometry.observing([part]):
        for h_BLD, valid_BL in zip(states, valid, strict=True):
            geometry.expect(torch.where(valid_BL, 1, -100))
            part.norm(h_BLD)
    expected = effective_rank(states[valid])
    assert geometry.take()["geometry/effective_rank"] == pytest.approx(expected.item(), rel=1e-6)
    assert geometry.take() == {}


def test_nothing_is_observed_outside_and_nothing_stays_behind_an_error():
    geometry, part = HiddenStateGeometry(ALONE), part_with_norm()

    def failing_step():
        with geometry.observing([part]):
            geometry.expect(torch.ones(1, 4))
            raise RuntimeError("step")

    with pytest.raises(RuntimeError, match="step"):
        failing_step()
    part.norm(torch.randn(1, 4, 3))
    geometry.expect(torch.ones(1, 4))
    assert geometry.take() == {}
    with geometry.observing([SimpleNamespace(norm=None)]):
        assert geometry.take() == {}


class Counter(nn.Module):
    def __init__(self, counts: list[float]):
        super().__init__()
        self.register_buffer("tokens_per_expert_E", torch.tensor(counts))


def test_expert_load_is_the_steps_own_worst_ratio():
    # Counts that no balancing clears: what earlier steps added is not this step's.
    layers = [Counter([10.0, 0.0, 0.0, 0.0]), Counter([0.0, 0.0, 0.0, 100.0])]
    load = ExpertLoad(ALONE, [nn.ModuleList(layers)])
    load.begin_step(LOGGED)
    layers[0].tokens_per_expert_E += torch.tensor([4.0, 4.0, 4.0, 4.0])
    load.end_micro_batch(LOGGED)
    layers[1].tokens_per_expert_E += torch.tensor([8.0, 4.0, 2.0, 2.0])
    load.end_micro_batch(LOGGED)
    assert load.take() == {"moe/max_load": 2.0}
    assert load.take() == {}


def test_expert_load_is_silent_without_experts_and_between_logging_steps():
    dense = ExpertLoad(ALONE, [nn.Linear(2, 2)])
    dense.begin_step(LOGGED)
    dense.end_micro_batch(LOGGED)
    assert dense.take() == {}
    load = ExpertLoad(ALONE, [Counter([1.0, 2.0])])
    load.begin_step(replace(LOGGED, logged=False))
    load.end_micro_batch(LOGGED)
    assert load.take() == {}
