"""TorchTitan's own ConfigManager finds our configurations."""

import pytest
from torchtitan.config import ConfigManager

from nitp_titan.config_registry import function_name
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.training.trainer import NITPTrainer
from tests.helpers.trainers import running


@pytest.mark.parametrize("flavor", FLAVORS)
def test_config_manager_parses_every_flavor(flavor):
    config = ConfigManager().parse_args(["--module", "nitp_titan", "--config", function_name(flavor)])
    assert isinstance(config, NITPTrainer.Config)
    assert config.model_spec.flavor == flavor
    assert config.nitp.enable


def test_command_line_of_config_manager_reaches_ours_and_the_run_builds(tmp_path):
    words = "--module nitp_titan --config nitp_debug --nitp.weight 0.5 --nitp.target_layer 2 --training.steps 1"
    config = ConfigManager().parse_args([*words.split(), "--dump_folder", str(tmp_path)])
    assert (config.nitp.weight, config.nitp.target_layer, config.training.steps) == (0.5, 2, 1)
    with running(config) as trainer:
        assert trainer.loss_fn.weight == 0.5
        assert trainer.model_parts[0].config.target_layer == 2
        trainer.train()
    assert (tmp_path / "metrics.jsonl").exists()


def test_names_are_python_identifiers():
    assert function_name("9B-A1B") == "nitp_9b_a1b"
    assert function_name("1.9B-A0.3B") == "nitp_1p9b_a0p3b"
    assert all(function_name(flavor).isidentifier() for flavor in FLAVORS)
