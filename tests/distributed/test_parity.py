"""Runs on several gloo ranks against one process: same seed checkpoint, same seed, same global batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from nitp_titan.nitp_config import NITPConfig
from tests.ranks import run_on_ranks
from tests.trainers import metric_lines, running, trainer_config, write_corpus

TAGS = (
    "loss_metrics/global_avg_loss",
    "loss_metrics/ntp_loss",
    "loss_metrics/nitp_loss",
    "grad_norm",
    "geometry/effective_rank",
    "geometry/mean_cosine_similarity",
)

# flavor, number of ranks, fields of ParallelismConfig (and "activation_checkpoint")
LAYOUTS = [
    ("debug", 2, {}),
    ("debug", 2, {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}),
    ("debug", 2, {"tensor_parallel_degree": 2}),
    ("debug", 2, {"tensor_parallel_degree": 2, "enable_sequence_parallel": False}),
    ("debug", 4, {"tensor_parallel_degree": 2}),
    ("debug_moe", 2, {}),
    ("debug_moe", 2, {"expert_parallel_degree": 2}),
    ("debug_moe", 2, {"fsdp_reshard_after_forward": "always", "activation_checkpoint": "full"}),
]


def layout_id(layout: tuple[str, int, dict[str, Any]]) -> str:
    flavor, ranks, parallelism = layout
    words = [
        flavor,
        f"{ranks}ranks",
        *(f"{name.replace('_degree', '')}={value}" for name, value in parallelism.items()),
    ]
    return "-".join(words)


def train(folder: Path, corpus: Path, seed_checkpoint: Path, flavor: str, local: int, parallelism: dict) -> None:
    config = trainer_config(folder, corpus, flavor=flavor, nitp=NITPConfig(geometry_freq=1))
    config.training.local_batch_size = local
    for name, value in parallelism.items():
        if name == "activation_checkpoint":
            config.activation_checkpoint = {"full": FullAC, "selective": SelectiveAC}[value].Config()
        else:
            setattr(config.parallelism, name, value)
    config.checkpoint.enable = config.checkpoint.load_only = True
    config.checkpoint.initial_load_path = str(seed_checkpoint)
    with running(config) as trainer:
        trainer.train()


def values(folder: Path) -> torch.Tensor:
    return torch.tensor([[line[tag] for tag in TAGS] for line in metric_lines(folder)], dtype=torch.float64)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    """By flavor: corpus, seed checkpoint and the values of one process."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    made = {}

    def of(flavor: str) -> tuple[Path, Path, torch.Tensor]:
        if flavor not in made:
            folder = tmp_path_factory.mktemp(flavor)
            config = trainer_config(folder / "seed", corpus, flavor=flavor)
            config.checkpoint.enable = config.checkpoint.create_seed_checkpoint = True
            with running(config) as trainer:
                trainer.checkpointer.save(0, last_step=True)
            seed_checkpoint = folder / "seed" / "checkpoint" / "step-0"
            train(folder / "one", corpus, seed_checkpoint, flavor, 8, {})
            made[flavor] = corpus, seed_checkpoint, values(folder / "one")
        return made[flavor]

    return of


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_layout_has_the_losses_and_the_geometry_of_one_process(layout, reference, tmp_path):
    flavor, ranks, parallelism = layout
    corpus, seed_checkpoint, expected = reference(flavor)
    run_on_ranks(ranks, train, tmp_path, corpus, seed_checkpoint, flavor, 2, parallelism)
    torch.testing.assert_close(values(tmp_path), expected, rtol=1e-5, atol=0)
