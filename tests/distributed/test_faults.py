"""Numbers that are not finite on one rank, stage or micro-batch: all ranks skip the step alike, and nothing changes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nitp_titan.training.decisions import GRADIENT, LOSS
from nitp_titan.training.errors import NotFinite
from nitp_titan.training.faults_config import FaultsConfig
from tests.distributed.layouts import Layout, layout
from tests.distributed.parity import config_of
from tests.helpers.faults import INF, NAN, Poison, differing, each_call, poison, whole_state
from tests.helpers.ranks import run_on_ranks
from tests.helpers.trainers import metric_lines, running

STEPS = 8
BAD = (2, 4, 5, 7)
LAYOUTS = [
    layout("debug", 2, local_batch_size=2),
    layout("debug", 4, replicate=2, local_batch_size=1),
    layout("debug", 2, tp=2, local_batch_size=4),
    layout("debug", 2, cp=2),
    layout("debug", 2, pp=2, schedule="1F1B", local_batch_size=2),
    layout("debug", 2, pp=2, schedule="Interleaved1F1B"),
    layout("debug_moe", 2, ep=2, local_batch_size=2),
    layout("debug_moe", 4, ep=2, tp=2, compile="aot_eager"),
    layout("debug_moe", 4, pp=2, ep=2, schedule="1F1B"),
]


def drawn(layout: Layout) -> list[Poison]:
    """Return a fault for each bad step: what, on which rank, and in which micro-batch."""
    generator = random.Random(str(layout))
    faults = []
    for number, step in enumerate(BAD):
        # Each kind at least once.
        kind = ("activation", "gradient", "loss")[number % 3]
        rank = generator.randrange(layout.ranks)
        if kind == "loss" and "pp" in layout.parallelism:
            rank = layout.ranks - 1  # the last stage has it
        sequences = 8 // layout.data_parallel_degree
        calls = sequences // layout.local_batch_size
        value = generator.choice([NAN, INF, -INF])
        faults.append(Poison([step], kind, value, rank=rank, micro_batch=generator.randrange(calls)))
    return faults


class Found(NamedTuple):
    """What a rank has seen: of each step whether it changed anything, and of each bad one what was said of it."""

    changed: list[bool]
    said: list[tuple[int, int, int]]


def train(folder: Path, layout: Layout, faults: list[Poison], implementation: str) -> Found:
    config = config_of(folder, layout)
    config.training.steps, config.metrics.log_freq, config.validator.enable = STEPS, 3, False
    config.nitp.geometry_freq = 3
    config.optimizer.implementation = implementation
    config.faults = FaultsConfig(on_nonfinite="skip")
    changed, said = [], []
    with running(config) as trainer:
        for fault in faults:
            poison(trainer, fault)
        before = whole_state(trainer)

        def note() -> None:
            nonlocal before
            after = whole_state(trainer)
            changed.append(bool(differing(after, before)))
            before = after
            if trainer.step in BAD:
                last = trainer.faults.look().last
                said.append((last.step, last.reason, last.rank))

        each_call(trainer, "train_step", note)
        trainer.train()
    return Found(changed, said)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_ranks_skip_a_bad_step_alike(layout: Layout, tmp_path):
    faults = drawn(layout)
    implementation = "foreach" if layout.parallelism.get("cp") else "fused"
    found = run_on_ranks(layout.ranks, train, tmp_path, layout, faults, implementation)
    for rank in found:
        assert rank.changed == [step not in BAD for step in range(1, STEPS + 1)]
        assert rank.said == found[0].said
    for fault, (step, reason, rank) in zip(faults, found[0].said, strict=True):
        assert [step] == fault.steps
        assert reason == (GRADIENT if fault.kind == "gradient" else LOSS)
        if fault.kind == "gradient":
            assert rank == fault.rank
    lines = metric_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 3, 6]
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in lines)
    assert [line["faults/skipped_steps"] for line in lines] == [0, 1, 3]


def stopped(folder: Path, layout: Layout, fault: Poison) -> str:
    config = config_of(folder, layout)
    config.training.steps, config.metrics.log_freq, config.validator.enable = STEPS, 1, False
    with running(config) as trainer:
        poison(trainer, fault)
        try:
            trainer.train()
        except NotFinite as error:
            return f"at {trainer.step}: {error}"
    return "not stopped"


@pytest.mark.parametrize("at", [0, 4], ids=lambda at: str(LAYOUTS[at]))
def test_all_ranks_stop_with_the_same_sentence(at: int, tmp_path):
    said = run_on_ranks(2, stopped, tmp_path, LAYOUTS[at], Poison([3], "loss", rank=1))
    assert said[0].startswith("at 3: step 3: its loss is not finite, first on rank 1; ")
    assert said[1] == said[0]
