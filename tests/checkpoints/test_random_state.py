"""The random state of a rank in a checkpoint."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nitp_titan.checkpoints.manager import without_what_the_checkpoint_lacks
from nitp_titan.checkpoints.random_state import ANEW, LAYOUT, RANDOM_STATE, RandomState
from nitp_titan.job import JobError

CPU = torch.device("cpu")
NAMES = ("rank_0.python", "rank_0.numpy", "rank_0.torch_cpu")


def draw() -> list[float]:
    # An odd number of normal ones leaves one over in Python's and NumPy's generators.
    return [random.gauss(0, 1), np.random.normal(), random.random(), np.random.random(), *torch.randn(3).tolist()]


@pytest.fixture(autouse=True)
def seeded():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()


def saved(folder, **tensors):
    dcp.save({RANDOM_STATE: {**RandomState("2 cpu", CPU).state_dict(), **tensors}}, checkpoint_id=folder, no_dist=True)
    return FileSystemReader(folder).read_metadata().state_dict_metadata


def loaded(folder, layout: str = "2 cpu") -> str:
    state = RandomState(layout, CPU)
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    dcp.load(without_what_the_checkpoint_lacks({RANDOM_STATE: state}, stored), checkpoint_id=folder, no_dist=True)
    return state.outcome


def test_every_generator_goes_on_from_a_checkpoint_of_tensors_alone(tmp_path):
    stored = saved(tmp_path)
    assert stored.keys() == {f"{RANDOM_STATE}.{name}" for name in (LAYOUT, *NAMES)}
    assert all(isinstance(entry, TensorStorageMetadata) for entry in stored.values())
    expected = [draw(), draw()]
    assert loaded(tmp_path) == "restored on every rank (python, numpy, torch_cpu)"
    assert [draw(), draw()] == expected


def test_what_is_saved_is_the_state_of_the_moment():
    state = RandomState("1 cpu", CPU).state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    draw()
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    later = RandomState("1 cpu", CPU).state_dict()
    assert not any(torch.equal(later[name], kept[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("change", "layout", "outcome"),
    [
        ({}, "2 cpu tp=2", 'saved on "2 cpu", which means nothing on "2 cpu tp=2"'),
        ({"rank_0.torch_cpu": torch.zeros(16, dtype=torch.uint8)}, "2 cpu", "of torch_cpu not in this checkpoint"),
        ({LAYOUT: torch.zeros(3)}, "2 cpu", "not in this checkpoint, which is older"),
    ],
)
def test_what_does_not_fit_is_left_and_said(change, layout, outcome, tmp_path):
    saved(tmp_path, **change)
    expected = [draw(), draw()]
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()
    found = loaded(tmp_path, layout)
    assert found.startswith(outcome)
    assert found.endswith(f"; {ANEW}")
    assert [draw(), draw()] == expected


def test_no_state_of_a_generator_is_refused_in_a_line(tmp_path):
    saved(tmp_path, **{"rank_0.python": torch.full((627,), -1)})
    with pytest.raises(JobError, match=r"random_state.rank_0.python is no state of that generator .*exclude_from"):
        loaded(tmp_path)
