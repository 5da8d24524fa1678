"""A run that goes on in its folder: what it says, what it logs, and checkpoints of before what is saved since."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import _stateful_to_state_dict
from torchtitan.tools.logging import logger

from nitp_titan.checkpoints.manager import CheckpointManager
from nitp_titan.checkpoints.random_state import RANDOM_STATE
from nitp_titan.checkpoints.tokens_seen import TOKENS_SEEN
from nitp_titan.runs.scalars import read_scalars
from tests.helpers.trainers import metric_lines, running, trainer_config

LOSS = "loss_metrics/global_avg_loss"


def config_of(folder: Path, corpus: Path, steps: int, **checkpoint):
    config = trainer_config(
        folder,
        corpus,
        checkpoint=CheckpointManager.Config(enable=True, interval=2, last_save_model_only=False, **checkpoint),
    )
    config.training.steps, config.lr_scheduler.total_steps = steps, 6
    return config


def train(config, changes=()) -> str:
    """Train, and return what was said of the resumption."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with running(config) as trainer:
            trainer.changes = changes
            trainer.train()
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    blocks = [text for text in said if text.startswith("Resumed")]
    assert len(blocks) <= 1
    return "".join(blocks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert train(config_of(folder, corpus, 5)) == ""
    return folder


def test_a_run_that_is_set_back_says_what_is_resumed_and_is_one_curve(whole, tmp_path, corpus):
    train(config_of(tmp_path, corpus, 3))
    lines = (tmp_path / "metrics.jsonl").read_text()
    # As a run leaves it that was killed while it wrote; and it had logged more often.
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 4, "loss')
    config = config_of(tmp_path, corpus, 5, load_step=2)
    config.metrics.log_freq = 5
    said = train(config, changes=["nitp.weight = 0.5, was 1.0"])
    expected = {line["step"]: line for line in metric_lines(whole)}
    assert said.splitlines() == [
        "Resumed at step 2 of 5, 1,024 tokens seen",
        f"  data: 16 sequences drawn, epoch 1, {said.partition('epoch 1, ')[2].partition(chr(10))[0]}",
        f"  learning rate of step 3: {expected[3]['lr/AdamW']:.6g}",
        "  random state: restored on every rank (python, numpy, torch_cpu)",
        "  settings that differ:",
        "    nitp.weight = 0.5, was 1.0",
    ]
    found = {line["step"]: line for line in metric_lines(tmp_path)}
    assert found.keys() == {1, 2, 5}
    assert found[5][LOSS] == expected[5][LOSS]
    assert found[5]["n_tokens_seen"] == expected[5]["n_tokens_seen"] == 5 * 512
    assert [step for step, _ in read_scalars(tmp_path)[LOSS]] == [1, 2, 5]
    assert len(list((tmp_path / "tb").iterdir())) == 1


def older_checkpoint(whole: Path, corpus: Path, folder: Path) -> None:
    """Save in ``folder`` what the run ``whole`` had at its end, without what is saved since."""
    with running(config_of(whole, corpus, 5)) as trainer:
        trainer.checkpointer.load()
        states = _stateful_to_state_dict(trainer.checkpointer._flattened_model_states_sd())
        assert states[RANDOM_STATE]
        assert states["train_state"].pop(TOKENS_SEEN) == 5 * 512
        del states[RANDOM_STATE]
        dcp.save(states, checkpoint_id=folder / "checkpoint" / "step-5")


def test_a_checkpoint_of_before_goes_on(whole, tmp_path, corpus):
    older_checkpoint(whole, corpus, tmp_path)
    said = train(config_of(tmp_path, corpus, 6))
    assert "Resumed at step 5 of 6, 2,560 tokens seen\n" in said
    assert "random state: not in this checkpoint, which is older; they begin anew" in said
    assert "settings: as before" in said
    [line] = metric_lines(tmp_path)
    assert (line["step"], line["n_tokens_seen"]) == (6, 6 * 512)


def test_states_that_are_left_out_are_said(whole, tmp_path, corpus):
    (tmp_path / "checkpoint").symlink_to(whole / "checkpoint")
    config = config_of(tmp_path, corpus, 6, exclude_from_loading=[RANDOM_STATE, "dataloader"], load_only=True)
    said = train(config)
    assert "random state: left out, as checkpoint.exclude_from_loading says; they begin anew" in said
    assert "0 sequences drawn" in said
    assert "since checkpoint.exclude_from_loading starts them afresh" in said


def test_a_start_that_fails_leaves_the_metrics(tmp_path, corpus):
    train(config_of(tmp_path, corpus, 3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with running(config_of(tmp_path, corpus, 5, load_step=2)) as trainer:
        trainer.checkpointer.load(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
