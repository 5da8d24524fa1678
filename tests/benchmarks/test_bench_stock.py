"""The stock variant is TorchTitan's own, all through."""

from __future__ import annotations

import dataclasses

import pytest
from torchtitan.config import Configurable
from torchtitan.trainer import Trainer

from benchmarks.jobs import Data, load_entry, trainer_config
from benchmarks.stock import stock_config
from benchmarks.variants import VARIANTS
from nitp_titan.training.joint_loss import JointLoss
from nitp_titan.training.trainer import NITPTrainer


def config_of(job: str, tmp_path, variant: str = "stock"):
    entry = load_entry(f"train_configs/{job}.toml", [], VARIANTS[variant], world_size=1, dump_folder=tmp_path)
    return trainer_config(entry, Data())


def owners(value, path: str = "") -> dict[str, type]:
    """Every component of a configuration, by its place."""
    found: dict[str, type] = {}
    if isinstance(value, Configurable.Config):
        found[path] = type(value)._owner or object
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            found |= owners(getattr(value, field.name), f"{path}.{field.name}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found |= owners(item, f"{path}[{i}]")
    return found


@pytest.mark.parametrize("job", ["debug", "debug_moe"])
def test_no_component_is_ours_but_the_data(job, tmp_path):
    config = config_of(job, tmp_path)
    assert type(config) is Trainer.Config
    found = owners(config)
    ours = {path for path, owner in found.items() if not owner.__module__.startswith("torchtitan.")}
    assert ours == {".dataloader", ".tokenizer"}
    assert len(found) > 40
    # The other variants have ours, so that this finds them.
    other = owners(config_of(job, tmp_path, "ntp"))
    assert other[""] is NITPTrainer
    ours = {path for path, owner in other.items() if owner.__module__.startswith("nitp_titan")}
    assert any(path.endswith(".rope") for path in ours)
    assert any("experts" in path for path in ours) == (job == "debug_moe")


def test_values_are_the_jobs(tmp_path):
    config = config_of("debug", tmp_path)
    assert (config.training.seq_len, config.training.local_batch_size) == (256, 8)
    assert config.lr_scheduler.warmup_steps == 20
    assert config.metrics.log_freq == 10**9


def test_a_component_without_a_counterpart_is_refused(tmp_path):
    entry = load_entry("train_configs/debug.toml", [], VARIANTS["ntp"], world_size=1, dump_folder=tmp_path)
    config = trainer_config(entry, Data())
    with pytest.raises(ValueError, match="JointLoss has no counterpart"):
        stock_config(dataclasses.replace(config, loss=JointLoss.Config()))


def test_nitp_is_refused(tmp_path):
    entry = load_entry("train_configs/debug.toml", [], VARIANTS["nitp"], world_size=1, dump_folder=tmp_path)
    entry = dataclasses.replace(entry, variant=dataclasses.replace(entry.variant, trainer="torchtitan"))
    with pytest.raises(ValueError, match=r"set nitp\.enable = false"):
        trainer_config(entry, Data())
