"""Runs with float8: they train, compiled or not, and leave the checkpoints that others leave."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.quantization import Float8Linear
from torchtitan.config import CompileConfig
from torchtitan.distributed.activation_checkpoint import SelectiveAC

from nitp_titan.float8 import converter as converter_module
from nitp_titan.float8.config import Float8Config
from nitp_titan.models.registry import model_registry
from nitp_titan.nitp.config import NITPConfig
from tests.helpers.trainers import metric_lines, running, trainer_config

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def float8_config(folder: Path, corpus: Path, flavor: str = "debug", **float8):
    """A run of a debug model with two blocks."""
    config = trainer_config(folder, corpus)
    config.model_spec = model_registry(flavor, n_layers=2)
    config.float8 = Float8Config(**float8)
    return config


def losses(folder: Path) -> list[float]:
    return [line["loss_metrics/global_avg_loss"] for line in metric_lines(folder)]


def trained(
    folder: Path,
    corpus: Path,
    *,
    flavor: str = "debug",
    steps: int = 4,
    seq_len: int = 64,
    sequences: int = 8,
    compiled: bool = False,
    **float8,
):
    config = float8_config(folder, corpus, flavor, **float8)
    config.training.steps, config.training.seq_len = steps, seq_len
    config.training.local_batch_size, config.training.global_batch_size = sequences // 2, sequences
    if compiled:
        config.compile = CompileConfig(enable=True, backend="aot_eager")
        config.activation_checkpoint = SelectiveAC.Config()
    with running(config) as trainer:
        trainer.train()
    return losses(folder)


def test_every_recipe_trains_in_its_own_way(tmp_path, corpus):
    curves = {"none": trained(tmp_path / "none", corpus)}
    for recipe in RECIPES:
        curves[recipe] = trained(tmp_path / recipe, corpus, recipe=recipe, emulate=True)
    for curve in curves.values():
        assert all(later < earlier for earlier, later in pairwise(curve))
        # Rounded, not something else: within a per cent of the curve without.
        assert curve == pytest.approx(curves["none"], rel=0.01)
    assert len({tuple(curve) for curve in curves.values()}) == 4


@pytest.mark.parametrize(("flavor", "recipe"), [("debug", "tensorwise"), ("debug_moe", "rowwise")])
def test_compiled_is_eager(tmp_path, corpus, flavor, recipe):
    float8 = {"flavor": flavor, "recipe": recipe, "emulate": True, "experts": flavor == "debug_moe", "steps": 2}
    eager = trained(tmp_path / "eager", corpus, **float8)
    compiled = trained(tmp_path / "compiled", corpus, compiled=True, **float8)
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    assert compiled[1] == pytest.approx(eager[1], rel=1e-3)


@pytest.mark.usefixtures("cpu_products")
def test_torchs_float8_operator_trains_as_the_emulated_one(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(converter_module, "has_cuda_capability", lambda major, minor: True)
    # oneDNN's product is a reference implementation on a CPU without one of its own: 1.5 minutes for 1,000 tokens.
    few = {"recipe": "tensorwise", "seq_len": 16, "sequences": 2}
    emulated = trained(tmp_path / "emulated", corpus, emulate=True, **few)
    assert trained(tmp_path / "real", corpus, **few) == pytest.approx(emulated, rel=2e-3)
    compiled = trained(tmp_path / "compiled", corpus, compiled=True, steps=2, **few)
    assert compiled == pytest.approx(emulated[:2], rel=2e-3)


def test_checkpoints_are_those_of_a_run_without_float8(tmp_path, corpus):
    def run(steps: int, **float8) -> dict[str, tuple]:
        config = float8_config(tmp_path / "runs", corpus, "debug_moe", **float8)
        config.training.steps = steps
        config.checkpoint.enable = True
        config.checkpoint.last_save_model_only = False
        with running(config) as trainer:
            trainer.train()
        found = FileSystemReader(tmp_path / "runs" / "checkpoint" / f"step-{steps}").read_metadata()
        tensors = (item for item in found.state_dict_metadata.items() if isinstance(item[1], TensorStorageMetadata))
        return {key: (value.size, value.properties.dtype) for key, value in tensors}

    float8 = run(2, recipe="rowwise", emulate=True, experts=True)
    plain = run(3)  # goes on from the float8 run's checkpoint
    assert plain == float8
    assert run(4, recipe="tensorwise", emulate=True) == plain
    assert [line["step"] for line in metric_lines(tmp_path / "runs")] == [1, 2, 3, 4]


def test_stock_torchtitan_can_be_converted_too(tmp_path, corpus):
    config = float8_config(tmp_path, corpus, recipe="rowwise_with_gw_hp", emulate=True)
    config.nitp, config.loss = NITPConfig(enable=False), CrossEntropyLoss.Config(global_vocab_size=320)
    with running(config) as trainer:
        model = trainer.model_parts[0]
        assert isinstance(model.layers["0"].attention.wo, Float8Linear)
        assert not isinstance(model.lm_head, Float8Linear)
        trainer.train()
    curve = losses(tmp_path)
    assert curve[-1] < curve[0]
