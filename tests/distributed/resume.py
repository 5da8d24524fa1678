"""Runs that are stopped and go on, on their own layout or on another, and what they leave."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nitp_titan.checkpoints.manager import CheckpointManager
from nitp_titan.checkpoints.random_state import RANDOM_STATE
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.float8.config import Float8Config
from nitp_titan.training.hooks import Hook, Moment
from nitp_titan.training.validator import Validator
from tests.distributed.layouts import Layout
from tests.distributed.parity import config_of
from tests.helpers.trainers import metric_lines, running

BEFORE, STEPS = 2, 4
"""Steps before a run is stopped, and in all."""

_OF_THE_CLOCK = ("throughput", "tflops", "time_metrics", "memory", "mfu")


@dataclass
class Left:
    """What a rank had at the end of a run."""

    state: dict[str, Any]
    """Name -> a digest of its bits, or its value."""

    tokens: int
    draws: dict[int, list[float]]
    """Step -> what the generators of Python, NumPy and torch gave in it."""

    rows: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    """Step -> the sequences that this rank trained on."""


def config_for(
    folder: Path, corpus: Path, layout: Layout, *, steps: int = STEPS, mode: str = "disabled", recipe: str = "none"
) -> Any:
    config = config_of(folder, layout)
    config.dataloader = TextDataLoader.Config(dataset="text", dataset_path=str(corpus), num_streams=8)
    config.validator = Validator.Config()
    config.training.steps = steps
    config.lr_scheduler.total_steps = STEPS
    if recipe != "none":  # emulated, which is slow
        config.model_spec.model.layers = config.model_spec.model.layers[:2]
    config.float8 = Float8Config(recipe=recipe, emulate=recipe != "none", experts="moe" in layout.model)
    config.checkpoint = CheckpointManager.Config(
        enable=True, interval=BEFORE, last_save_model_only=False, async_mode=mode
    )
    return config


def trained(config: Any) -> Left:
    """Train to the end, from the run's checkpoint where it has one; every step draws random numbers."""
    goes_on = Path(config.dump_folder, "checkpoint").exists()
    watch = _Watch()
    with running(config) as trainer:
        trainer.hooks.append(watch)
        watch.record(trainer)
        # What goes on has nothing to go on from but its checkpoint.
        _seed_all(random.SystemRandom().getrandbits(32) if goes_on else dist.get_rank())
        trainer.train()
        state = dict(_digests("", _states(trainer)))
        return Left(state, trainer.tokens_seen, watch.draws, watch.rows)


LAST = "last"
"""Instead of a mode of saving: the checkpoint of a run's last step, which is saved in full, and waited for."""


def stopped_and_not(folder: Path, corpus: Path, layout: Layout, mode: str, recipe: str) -> tuple[Left, Left]:
    """Train in ``whole`` without a stop, and go on in ``resumed`` from a checkpoint that is saved as ``mode`` says."""
    if mode == LAST:
        whole = trained(config_for(folder / "whole", corpus, layout, recipe=recipe))
        trained(config_for(folder / "resumed", corpus, layout, recipe=recipe, steps=BEFORE))
        return whole, trained(config_for(folder / "resumed", corpus, layout, recipe=recipe))
    whole = trained(config_for(folder / "whole", corpus, layout, mode=mode, recipe=recipe))
    taken_over(folder / "whole", folder / "resumed")
    return whole, trained(config_for(folder / "resumed", corpus, layout, mode=mode, recipe=recipe))


def not_stopped(folder: Path, corpus: Path, layout: Layout) -> Left:
    return trained(config_for(folder, corpus, layout))


def gone_on(whole: Path, folder: Path, corpus: Path, layout: Layout) -> Left:
    """Go on in ``folder`` from the checkpoint within another run."""
    taken_over(whole, folder)
    return trained(config_for(folder, corpus, layout))


def taken_over(whole: Path, folder: Path) -> None:
    """Copy the checkpoint of :data:`BEFORE`, by one rank for all of them."""
    name = Path("checkpoint", f"step-{BEFORE}")
    if dist.get_rank() == 0:
        shutil.copytree(whole / name, folder / name)
    dist.barrier()


def logged(folder: Path, after: int = 0) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics of the steps after one, without what the clock has to do with."""
    lines = [line for line in metric_lines(folder) if line["step"] > after]
    return [{tag: value for tag, value in line.items() if not tag.startswith(_OF_THE_CLOCK)} for line in lines]


class _Watch(Hook):
    """Draws from every generator in each step, and keeps that and the step's sequences."""

    def __init__(self) -> None:
        self.draws: dict[int, list[float]] = {}
        self.rows: dict[int, list[tuple[int, ...]]] = {}

    def begin_step(self, moment: Moment) -> None:
        # In the second step the second of a pair of normal numbers is left over, which is part of the state.
        normal = [generator(0, 1) for _ in range(moment.step) for generator in (random.gauss, np.random.normal)]
        self.draws[moment.step] = [*normal, random.random(), np.random.random(), *torch.rand(3).tolist()]

    def record(self, trainer: Any) -> None:
        fetch = trainer._batches_of_step

        def fetched(batches: Any) -> Any:
            found = fetch(batches)
            self.rows[trainer.step] = [tuple(row) for inputs, _ in found for row in inputs["input"].tolist()]
            return found

        trainer._batches_of_step = fetched


def _seed_all(number: int) -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(number)


def _states(trainer: Any) -> dict[str, Any]:
    tensors = [pair for part in trainer.model_parts for pair in (*part.named_parameters(), *part.named_buffers())]
    return {
        "model": dict(tensors),
        "optimizer": trainer.optimizers.state_dict(),
        "schedule": trainer.lr_schedulers.state_dict(),
        "data": trainer.dataloader.state_dict(),
        "random": trainer.checkpointer.states[RANDOM_STATE].state_dict(),
        "trainer": trainer.state_dict(),
    }


def _digests(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _digests(f"{name}.{key}", item)
    elif isinstance(value, torch.Tensor):
        tensor = value.to_local() if isinstance(value, DTensor) else value
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(raw).hexdigest()}"
    else:
        yield name, value
