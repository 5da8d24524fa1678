"""Steps, ranks and micro-batches in which no label counts, against one process that has all labels in one batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torchtitan.components.loss import ChunkedLossWrapper

from nitp_titan.nitp.config import NITPConfig
from tests.distributed.batches import ROWS, FewLabels
from tests.distributed.layouts import Layout, layout
from tests.distributed.parity import LOSSES, STEPS, VALIDATION, References, gradients, ratio, run_layout, values

WITHOUT = [1, 3]
"""Steps, counted from 0, without any label that counts."""

MAX = "loss_metrics/global_max_loss"


def with_few_labels(config: Any) -> None:
    """Train on :class:`FewLabels`, and validate on the few of the first step; a step without labels has no geometry."""
    config.dataloader = config.validator.dataloader = FewLabels.Config(vocab_size=config.dataloader.vocab_size)
    config.nitp.geometry_freq = 0


def stock_with_few_labels(config: Any) -> None:
    """The same without NITP, so with TorchTitan's own loss."""
    with_few_labels(config)
    config.nitp = NITPConfig(enable=False, geometry_freq=0)
    config.loss = ChunkedLossWrapper.Config(num_chunks=4)


LAYOUTS = [
    layout("debug", 2),
    layout("debug", 2, local_batch_size=1),
    layout("debug", 2, cp=2, implementation="reference"),
    layout("debug", 4, cp=2, tp=2, balancer=None, nitp={"shift": 0, "stop_gradient": False}),
    layout("debug", 4, pp=2, schedule="1F1B"),
    layout("debug_moe", 2, ep=2, tp=2, nitp={"loss": "generic_cosine"}),
]


def _agree(layout: Layout, one: Path, folder: Path, tags: tuple[str, ...]) -> None:
    found, expected = values(folder, (*tags, "grad_norm", MAX)), values(one, (*tags, "grad_norm", MAX))
    assert found.shape == (STEPS, len(tags) + 2)
    assert expected.isfinite().all()
    assert found.isfinite().all()
    errors = ratio((found - expected).abs(), expected.abs())
    assert errors[0, : len(tags)].max() < 1e-5
    assert errors[1:, : len(tags)].max() < 1e-4
    assert errors[:, len(tags)].max() < 3e-4
    # Nothing to predict, nothing to learn from: no loss of any kind, and no gradient.
    assert not found[WITHOUT].any()
    # The largest mean of a rank that has labels is no less than the mean over all. (TorchTitan divides a context
    # rank's sum by the labels of whole sequences.)
    assert "cp" in layout.parallelism or (found[:, -1] >= found[:, 0] * (1 - 1e-6)).all()
    validation = VALIDATION if len(tags) == len(LOSSES) else VALIDATION[:1]
    found, expected = values(folder, validation)[-1], values(one, validation)[-1]
    assert expected.all()
    assert ratio((found - expected).abs(), expected.abs()).max() < 1e-4
    of, expected_of = gradients(folder), gradients(one)
    assert of.keys() == expected_of.keys()
    for name, grad in expected_of.items():
        assert ratio((of[name] - grad).norm(), grad.norm()) < 1e-4, name


@pytest.fixture(scope="module")
def with_nitp(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("nitp"), with_few_labels)


@pytest.fixture(scope="module")
def without_nitp(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("stock"), stock_with_few_labels)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_nothing_to_predict_is_a_loss_of_zero(layout: Layout, with_nitp: References, tmp_path: Path):
    _agree(layout, run_layout(layout, tmp_path, with_nitp), tmp_path, LOSSES)


@pytest.mark.parametrize("layout", [layout("debug", 2), layout("debug", 4, cp=2, tp=2)], ids=str)
def test_so_it_is_without_nitp(layout: Layout, without_nitp: References, tmp_path: Path):
    _agree(layout, run_layout(layout, tmp_path, without_nitp), tmp_path, LOSSES[:2])


def test_the_batches_have_few_labels():
    each = ROWS // 2
    counts = torch.empty(2, STEPS * each)
    for rank in range(2):
        loader = FewLabels(FewLabels.Config(vocab_size=300), dp_world_size=2, dp_rank=rank, local_batch_size=1)
        for i, (_, labels) in enumerate(itertools.islice(loader, STEPS * each)):
            counts[rank, i] = (labels != -100).sum()
    first, second = counts.view(2, STEPS, each)
    assert first[0].tolist() == [16, 0, 0, 0]
    assert not second[0].any()
    for step in range(1, STEPS):
        assert bool(first[step].any()) == bool(second[step].any()) == (step not in WITHOUT)
