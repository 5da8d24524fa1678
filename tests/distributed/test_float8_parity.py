"""Emulated float8 on several gloo ranks against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nitp_titan.float8.config import Float8Config
from nitp_titan.models.registry import model_registry
from nitp_titan.nitp.config import NITPConfig
from tests.helpers.ranks import run_on_ranks
from tests.helpers.trainers import metric_lines, running, trainer_config, write_corpus

# flavor, recipe, fields of ParallelismConfig, relative tolerance of the first step's losses and gradient norm
LAYOUTS = [
    ("debug", "rowwise_with_gw_hp", {"tensor_parallel_degree": 2}, 1e-4),
    # One scale for all tokens of a micro-batch, which another layout puts together from other sequences.
    ("debug", "tensorwise", {}, 1e-2),
    ("debug_moe", "rowwise", {"expert_parallel_degree": 2}, 1e-4),
]


def job(folder: Path, corpus: Path, flavor: str) -> Any:
    config = trainer_config(folder, corpus, nitp=NITPConfig(geometry_freq=0))
    config.model_spec = model_registry(flavor, n_layers=2)
    config.training.steps = 1
    config.training.local_batch_size = 2
    config.checkpoint.enable = True
    return config


def train(folder: Path, corpus: Path, seed_checkpoint: Path, flavor: str, recipe: str, parallelism: dict) -> None:
    config = job(folder, corpus, flavor)
    config.float8 = Float8Config(recipe=recipe, emulate=True, experts=flavor == "debug_moe")
    for name, value in parallelism.items():
        setattr(config.parallelism, name, value)
    config.checkpoint.load_only = True
    config.checkpoint.initial_load_path = str(seed_checkpoint)
    with running(config) as trainer:
        trainer.train()


def values(folder: Path) -> torch.Tensor:
    tags = ("loss_metrics/ntp_loss", "loss_metrics/nitp_loss", "grad_norm")
    return torch.tensor([metric_lines(folder)[0][tag] for tag in tags], dtype=torch.float64)


@pytest.mark.parametrize(("flavor", "recipe", "parallelism", "tolerance"), LAYOUTS)
def test_layout_has_the_first_step_of_one_process(flavor, recipe, parallelism, tolerance, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    config = job(tmp_path / "seed", corpus, flavor)
    config.checkpoint.create_seed_checkpoint = True
    with running(config) as trainer:
        trainer.checkpointer.save(0, last_step=True)
    seed = tmp_path / "seed" / "checkpoint" / "step-0"
    train(tmp_path / "one", corpus, seed, flavor, recipe, {})
    run_on_ranks(2, train, tmp_path / "two", corpus, seed, flavor, recipe, parallelism)
    torch.testing.assert_close(values(tmp_path / "two"), values(tmp_path / "one"), rtol=tolerance, atol=0)
