"""Shrunken twins of every paper model, trained for real: the same depth, dense and MoE blocks, head dims and target."""

from __future__ import annotations

from typing import Any

import pytest
from torchtitan.components.optimizer import default_adamw

from nitp_titan.models.flavors import FLAVORS
from nitp_titan.models.registry import model_registry
from nitp_titan.nitp.config import NITPConfig
from tests.helpers.trainers import metric_lines, running, trainer_config

FAMILY = [name for name in FLAVORS if not name.startswith("debug")]


def shrunken(flavor: str) -> dict[str, Any]:
    """What makes a flavor small: two heads (of the flavor's width), few experts, a small vocabulary."""
    shape = FLAVORS[flavor].shape
    small: dict[str, Any] = {"n_heads": 2, "n_kv_heads": 1, "dim": 2 * shape.head_dim, "hidden_dim": 96}
    small |= {"vocab_size": 320, "max_seq_len": 64}
    if shape.num_experts:
        small |= {"num_experts": 6, "top_k": 2, "expert_hidden_dim": 32}
    return small


@pytest.mark.parametrize("flavor", FAMILY)
def test_a_shrunken_twin_learns(flavor, tmp_path, corpus):
    paper = FLAVORS[flavor].job_defaults["nitp"]
    config = trainer_config(tmp_path, corpus, nitp=NITPConfig(geometry_freq=0, **paper))
    config.model_spec = model_registry(flavor, **shrunken(flavor))
    config.training.steps, config.training.global_batch_size, config.training.seq_len = 5, 4, 32
    config.optimizer = default_adamw(lr=3e-4)
    config.optimizer.implementation = "foreach"
    with running(config) as trainer:
        model = trainer.model_parts[0]
        shape = FLAVORS[flavor].shape
        assert len(model.layers) == shape.n_layers
        assert sum(block.moe_enabled for block in model.layers.values()) == shape.moe_layers()
        assert model.layers["0"].attention.head_dim == shape.head_dim
        assert model.config.target_layer == paper["target_layer"]
        trainer.train()
    lines = metric_lines(tmp_path)
    for tag in ("loss_metrics/ntp_loss", "loss_metrics/nitp_loss"):
        assert lines[-1][tag] < 0.99 * lines[0][tag], tag
    assert ("moe/max_load" in lines[0]) == bool(shape.num_experts)
