"""Validation with an NITP decoder."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchtitan.components.optimizer import default_adamw

from nitp_titan.nitp.config import NITPConfig
from nitp_titan.nitp.objective import next_token_mask
from nitp_titan.training.validator import Validator
from tests.helpers.trainers import metric_lines, running, trainer_config


def test_validation_has_total_ntp_and_nitp(tmp_path, corpus):
    config = trainer_config(tmp_path, corpus, nitp=NITPConfig(weight=0.5, start_step=2))
    config.validator = Validator.Config(enable=True, freq=2, steps=2, dataloader=config.dataloader)
    config.training.steps = 2
    config.lr_scheduler.warmup_steps = 0
    with running(config) as trainer:
        trainer.train()
    lines = [line for line in metric_lines(tmp_path) if "validation_metrics/loss" in line]
    early, late = lines
    # Before the start step there is no NITP loss to validate.
    assert early["validation_metrics/loss"] == early["validation_metrics/ntp_loss"]
    assert "validation_metrics/nitp_loss" not in early
    ntp, nitp = late["validation_metrics/ntp_loss"], late["validation_metrics/nitp_loss"]
    assert late["validation_metrics/loss"] == pytest.approx(ntp + 0.5 * nitp)
    assert 0 < nitp < 2


def test_validation_losses_are_those_of_the_batches(tmp_path, corpus):
    config = trainer_config(tmp_path, corpus)
    config.validator = Validator.Config(enable=True, freq=1, steps=3, dataloader=config.dataloader)
    config.training.steps = 1
    config.optimizer = default_adamw(lr=0.0)
    config.lr_scheduler.warmup_steps = 0
    with running(config) as trainer:
        model, sums, labelled, pairs = trainer.model_parts[0], torch.zeros(2), 0, 0
        for inputs, labels in itertools.islice(trainer.dataloader, 3):
            masks = model.get_attention_masks(positions=inputs["positions"])
            with torch.no_grad():
                sums += model(inputs["input"], inputs["positions"], masks, labels=labels)[0]
            labelled += labels.numel()
            pairs += next_token_mask(inputs["positions"]).sum()
        trainer.dataloader.load_state_dict(trainer.dataloader.state_dict())
        trainer.train()
    (line,) = metric_lines(tmp_path)
    assert line["validation_metrics/ntp_loss"] == pytest.approx(sums[0].item() / labelled, rel=1e-5)
    assert line["validation_metrics/nitp_loss"] == pytest.approx(sums[1].item() / pairs.item(), rel=1e-5)
