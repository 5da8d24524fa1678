"""The exponential decay against its formula, TorchTitan's curves through our class, and none outside 0 and its peak."""

from itertools import pairwise

import pytest
import torch
from torchtitan.components.optimizer import LRSchedulersContainer as Upstream
from torchtitan.components.optimizer import default_adamw

from nitp_titan.checkpoints.manager import CheckpointManager
from nitp_titan.training.lr_scheduler import LRSchedulersContainer
from tests.helpers.trainers import metric_lines, running, trainer_config, write_corpus


class Optimizers(list):
    """As much of an OptimizersContainer as a scheduler wants."""


def rates(config: Upstream.Config, steps: int, taken: int | None = None) -> list[float]:
    """The rates of as many steps as are ``taken`` (all) of a run of ``steps``."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedulers = config.build(optimizers=Optimizers([optimizer]), training_steps=steps)
    found = []
    for _ in range(taken or steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedulers.step()
    return found


def test_exponential_falls_by_a_constant_factor_to_the_lowest_rate():
    config = LRSchedulersContainer.Config(warmup_steps=10, decay_ratio=0.2, decay_type="exponential", min_lr_factor=0.1)
    found = rates(config, 100)
    linear = rates(Upstream.Config(warmup_steps=10, decay_ratio=0.2, decay_type="linear"), 100)
    assert found[:81] == linear[:81]
    factors = [b / a for a, b in pairwise(found[81:])]
    assert factors == pytest.approx([factors[0]] * len(factors))
    progress = [1 - rate / 2.0 for rate in linear[81:]]
    assert found[81:] == pytest.approx([2.0 * 0.1**p for p in progress])
    assert 0.2 <= found[-1] < 0.25


@pytest.mark.parametrize("decay_type", ["linear", "sqrt", "cosine"])
def test_other_curves_are_torchtitans(decay_type):
    options = {"warmup_steps": 5, "decay_ratio": 0.5, "decay_type": decay_type, "min_lr_factor": 0.2}
    assert rates(LRSchedulersContainer.Config(**options), 40) == rates(Upstream.Config(**options), 40)


def test_a_resumed_run_takes_the_rate_of_its_own_schedule_at_once(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")

    def rates_taken(steps: int, lr: float) -> list[float]:
        checkpoint = CheckpointManager.Config(enable=True, interval=2, last_save_model_only=False)
        config = trainer_config(tmp_path / "run", corpus, checkpoint=checkpoint, optimizer=default_adamw(lr=lr))
        config.training.steps, config.optimizer.implementation = steps, "foreach"
        taken = []
        with running(config) as trainer:
            [optimizer] = trainer.optimizers
            optimizer.register_step_pre_hook(lambda *_: taken.append(optimizer.param_groups[0]["lr"]))
            trainer.train()
        return taken

    assert rates_taken(2, 1e-3)[-2:] == [5e-4, 1e-3]
    assert rates_taken(4, 5e-3)[-2:] == pytest.approx([5e-3, 2.5e-3])
    logged = {line["step"]: line["lr/AdamW"] for line in metric_lines(tmp_path / "run")}
    assert logged == pytest.approx({1: 5e-4, 2: 1e-3, 3: 5e-3, 4: 2.5e-3})


CURVES = ["linear", "sqrt", "cosine", "exponential"]


@pytest.mark.parametrize("decay_type", CURVES)
@pytest.mark.parametrize("lowest", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ratio", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize(("warmup", "total", "steps"), [(2, 7, 20), (0, 1, 9), (9, 5, 12), (5, 5, 20), (3, None, 10)])
def test_a_rate_is_never_below_its_end_nor_above_its_peak(decay_type, lowest, ratio, warmup, total, steps):
    if decay_type == "exponential" and not lowest:
        pytest.skip("refused")
    options = {"warmup_steps": warmup, "total_steps": total, "decay_ratio": ratio}
    config = LRSchedulersContainer.Config(**options, decay_type=decay_type, min_lr_factor=lowest)
    # A run that is resumed with more steps than its schedule has goes further still.
    found = rates(config, steps, taken=3 * steps)
    end = total or steps
    assert all(0 <= rate <= 2.0 for rate in found)
    decays = ratio != 0.0 and round(end * (1.0 if ratio is None else ratio)) > 0 and warmup < end
    assert found[end:] == pytest.approx([2.0 * (lowest if decays else 1.0)] * (3 * steps - end), abs=1e-15)
    assert found[end - 1] >= found[end] - 1e-15


@pytest.mark.parametrize(
    "options",
    [{"warmup_steps": -1}, {"total_steps": 0}, {"decay_ratio": 1.5}, {"decay_ratio": -0.1}, {"min_lr_factor": 2.0},
     {"min_lr_factor": -0.5}, {"min_lr_factor": float("nan")}],
)  # fmt: skip
def test_values_that_would_lead_outside_are_refused(options):
    [key] = options
    with pytest.raises(ValueError, match=f"lr_scheduler.{key}: found"):
        LRSchedulersContainer.Config(**options)


@pytest.mark.parametrize("lowest", [0.0, -0.1, 1.5])
def test_exponential_needs_a_lowest_rate(lowest):
    with pytest.raises(ValueError, match="min_lr_factor: found"):
        LRSchedulersContainer.Config(decay_type="exponential", min_lr_factor=lowest)
