"""Batches in which no label counts: a loss of zero and no gradient, in training and validation, NITP on and off."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

from nitp_titan.nitp.config import NITPConfig
from nitp_titan.runs.tags import EFFECTIVE_RANK, MEAN_COSINE
from nitp_titan.training.validator import Validator
from tests.distributed.batches import ROWS, SEQ_LEN, StraddlingBatches
from tests.helpers.trainers import metric_lines, running, trainer_config


class NoLabels(StraddlingBatches):
    """Of the steps counted from 1, odd ones have no label that counts."""

    @dataclass(kw_only=True, slots=True)
    class Config(StraddlingBatches.Config):
        pass

    def rows_of(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, positions, labels = super().rows_of(step)
        return tokens, positions, labels if step % 2 else torch.full_like(labels, -100)


def config_of(folder: Path, nitp: NITPConfig, **changes: Any) -> Any:
    config = trainer_config(folder, folder, nitp=nitp, **changes)
    config.dataloader = NoLabels.Config(vocab_size=258)
    config.training.seq_len, config.training.global_batch_size, config.training.local_batch_size = SEQ_LEN, ROWS, 4
    config.training.steps = 3
    return config


def gradients_of_steps(config: Any) -> list[dict[str, torch.Tensor]]:
    found = []
    with running(config) as trainer:
        update = trainer.optimizers.step

        def step() -> None:
            grads = {name: p.grad for name, p in trainer.model_parts[0].named_parameters()}
            found.append({n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in grads.items()})
            update()

        trainer.optimizers.step = step
        trainer.train()
    return found


@pytest.mark.parametrize(
    ("nitp", "loss"),
    [
        ({}, None),
        ({"shift": 0, "stop_gradient": False}, None),
        ({"loss": "generic_cosine"}, None),
        ({"loss": "kl", "projector": "none"}, None),
        ({"enable": False}, CrossEntropyLoss.Config()),
        ({"enable": False}, ChunkedLossWrapper.Config(num_chunks=4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("flavor", ["debug", "debug_moe"])
def test_a_step_without_labels_has_no_loss_and_no_gradient(tmp_path, flavor, nitp, loss):
    changes = {} if loss is None else {"loss": loss}
    config = config_of(tmp_path, NITPConfig(geometry_freq=0, **nitp), flavor=flavor, **changes)
    without, ordinary, again = gradients_of_steps(config)
    for gradients in (without, again):
        assert gradients.keys() == ordinary.keys()
        assert not any(grad.any() for grad in gradients.values())
    assert all(grad.isfinite().all() for grad in ordinary.values())
    assert any(grad.any() for grad in ordinary.values())
    first, second, third = metric_lines(tmp_path)
    losses = [tag for tag in first if tag.startswith("loss_metrics/")]
    assert len(losses) == (4 if loss is None else 3)  # total, largest, NTP and NITP
    for line in (first, third):
        assert [line[tag] for tag in (*losses, "grad_norm")] == [0] * (len(losses) + 1)
    assert second["loss_metrics/ntp_loss"] == pytest.approx(torch.tensor(258.0).log().item(), rel=0.1)


def test_a_step_without_labels_has_no_geometry(tmp_path):
    config = config_of(tmp_path, NITPConfig(geometry_freq=1))
    with running(config) as trainer:
        trainer.train()
    geometry = [{tag for tag in line if tag.startswith("geometry/")} for line in metric_lines(tmp_path)]
    assert geometry == [set(), {EFFECTIVE_RANK, MEAN_COSINE}, set()]
    assert None not in [value for line in metric_lines(tmp_path) for value in line.values()]


@pytest.mark.parametrize(("nitp", "loss"), [({}, None), ({"enable": False}, CrossEntropyLoss.Config())], ids=str)
def test_a_validation_without_labels_has_a_loss_of_zero_and_training_goes_on(tmp_path, caplog, nitp, loss):
    changes = {} if loss is None else {"loss": loss}
    config = config_of(tmp_path, NITPConfig(geometry_freq=0, **nitp), **changes)
    # Two micro-batches: those of the first step, which has no labels.
    config.validator = Validator.Config(enable=True, freq=2, steps=2, dataloader=config.dataloader)
    with running(config) as trainer:
        trainer.train()
        assert trainer.model_parts[0].training
    # TorchTitan validates in the first step, too.
    lines = [line for line in metric_lines(tmp_path) if "validation_metrics/loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    tags = [tag for tag in lines[0] if tag.startswith("validation_metrics/") and tag.endswith("loss")]
    assert len(tags) == (3 if loss is None else 1)
    assert [[line[tag] for tag in tags] for line in lines] == [[0] * len(tags)] * 2
    assert "No label of the validation batches counts" in caplog.text


def test_a_validation_counts_the_labels_that_there_are(tmp_path):
    config = config_of(tmp_path, NITPConfig(geometry_freq=0))
    config.training.steps, config.lr_scheduler.warmup_steps = 1, 0
    # Those of the first step, and those of the second.
    config.validator = Validator.Config(enable=True, freq=1, steps=4, dataloader=config.dataloader)
    with running(config) as trainer:
        trainer.train()
        model = trainer.model_parts[0]
        tokens, positions, labels = NoLabels.rows_of(trainer.dataloader, 1)
        masks = model.get_attention_masks(positions=positions)
        with torch.no_grad():
            ntp_sum, _ = model(tokens, positions, masks, labels=labels)[0].tolist()
    (line,) = metric_lines(tmp_path)
    assert line["validation_metrics/ntp_loss"] == pytest.approx(ntp_sum / (labels != -100).sum().item(), rel=1e-5)
