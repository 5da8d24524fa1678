"""dataloader.infinite = false: the end of the data is the end of the run, and nothing of it is lost."""

from __future__ import annotations

import dataclasses
import logging

import pytest
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.config import TrainingConfig

from nitp_titan.data.errors import DataError
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.training.validator import Validator
from tests.helpers.trainers import metric_lines, running, trainer_config

STEPS = 100


@pytest.fixture
def one_pass(tmp_path):
    """A run over seven batches of one sequence of 64 bytes, two batches a step: three steps, and a batch left over."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("x" * (6 * 64 + 30))
    config = trainer_config(tmp_path / "run", tmp_path / "corpus")
    config.dataloader = TextDataLoader.Config(dataset="text", dataset_path=str(tmp_path / "corpus"), infinite=False)
    config.training = dataclasses.replace(config.training, local_batch_size=1, global_batch_size=2, steps=STEPS)
    assert isinstance(config.training, TrainingConfig)
    config.checkpoint = CheckpointManager.Config(enable=True, interval=1000, last_save_model_only=False)
    return config


def run(config) -> int:
    """Train to the end of the data; return the step that is reached."""
    with running(config) as trainer:
        trainer.train()
        assert trainer.out_of_data
        return trainer.step


def test_the_last_step_is_saved_and_told(one_pass, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert run(one_pass) == 3
    assert [line["step"] for line in metric_lines(tmp_path / "run")] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-3"]
    assert "The data have ended (dataloader.infinite = false): step 3 of 100 was the run's last one" in caplog.text
    assert "its checkpoint is saved" in caplog.text
    assert "1 of 2 micro-batches were left over" in caplog.text

    # Started again, it is at its end, and says so; nothing is written.
    before = (tmp_path / "run" / "checkpoint" / "step-3" / ".metadata").stat().st_mtime_ns
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert run(one_pass) == 3
    assert "step 3 of 100 was the run's last one" in caplog.text
    assert "its checkpoint is saved" not in caplog.text
    assert (tmp_path / "run" / "checkpoint" / "step-3" / ".metadata").stat().st_mtime_ns == before


def test_data_of_no_step_are_refused(one_pass, tmp_path):
    (tmp_path / "corpus" / "a.txt").write_text("x" * 30)
    with pytest.raises(DataError, match=r"dataloader\.infinite: found false, and the data have not enough text"):
        run(one_pass)
    assert not list((tmp_path / "run").glob("checkpoint/*"))


def test_what_was_left_over_is_trained_on_by_a_run_that_can(one_pass, tmp_path):
    run(one_pass)
    one_pass.training = dataclasses.replace(one_pass.training, global_batch_size=1)
    assert run(one_pass) == 4


def test_a_run_in_two_parts_ends_as_one(one_pass, tmp_path):
    run(one_pass)
    parts = dataclasses.replace(one_pass, dump_folder=str(tmp_path / "parts"))
    parts.training = dataclasses.replace(parts.training, steps=2)
    parts.checkpoint = dataclasses.replace(parts.checkpoint)
    parts.lr_scheduler = dataclasses.replace(parts.lr_scheduler, total_steps=STEPS)
    with running(parts) as trainer:
        trainer.train()
        assert not trainer.out_of_data
    parts.training = dataclasses.replace(parts.training, steps=STEPS)
    assert run(parts) == 3
    whole, in_parts = (
        [line["loss_metrics/global_avg_loss"] for line in metric_lines(tmp_path / name)] for name in ("run", "parts")
    )
    assert in_parts == whole


def test_no_word_of_a_checkpoint_where_there_is_none(one_pass, caplog):
    one_pass.checkpoint = CheckpointManager.Config(enable=False)
    with caplog.at_level(logging.INFO):
        run(one_pass)
    assert "step 3 of 100 was the run's last one" in caplog.text
    assert "its checkpoint" not in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("steps", "text"), [(-1, ""), (2, ""), (-1, "{}\n")])
def test_validation_data_without_text_are_told_at_the_start(corpus, tmp_path, streaming, steps, text):
    (tmp_path / "nothing.jsonl").write_text(text.replace("{}", '{"text": ""}'))
    config = trainer_config(tmp_path / "run", corpus)
    path = str(tmp_path / "nothing.jsonl")
    data = TextDataLoader.Config(dataset="text", dataset_path=path, streaming=streaming, num_streams=1)
    config.validator = Validator.Config(enable=True, freq=100, steps=steps, dataloader=data)
    with pytest.raises(ValueError, match=r"nothing\.jsonl.* has no document with text"), running(config):
        pass


def test_validation_data_of_single_tokens_are_told_at_the_start(corpus, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n' * 5)
    config = trainer_config(tmp_path / "run", corpus)
    config.tokenizer.add_bos = config.tokenizer.add_eos = False
    data = TextDataLoader.Config(dataset="text", dataset_path=str(tmp_path / "short.jsonl"))
    config.validator = Validator.Config(enable=True, freq=100, steps=-1, dataloader=data)
    with pytest.raises(ValueError, match=r"validator\.dataloader: .*short\.jsonl has no text of two"), running(config):
        pass
