"""A run tells its hooks of its moments, in order, and once each."""

from __future__ import annotations

import pytest
import torch
from torchtitan.components.loss import CrossEntropyLoss

from nitp_titan.checkpoints.manager import CheckpointManager
from nitp_titan.nitp.dtensors import local
from nitp_titan.training.hooks import Hook, Moment
from tests.helpers.trainers import running, trainer_config

MOMENTS = ("begin_step", "end_micro_batch", "before_optimizer", "end_step", "saved", "close")


class Diary(Hook):
    """Notes every moment, and what the weights and gradients are then."""

    def __init__(self):
        self.pages: list[tuple[str, int]] = []
        self.weights: dict[tuple[str, int], torch.Tensor] = {}
        self.norms: list[float] = []
        for name in MOMENTS:
            setattr(self, name, lambda moment, name=name: self.note(name, moment))

    def note(self, name: str, moment: Moment) -> None:
        self.pages.append((name, moment.step))
        if name == "close":
            return
        self.weights[name, moment.step] = local(moment.model_parts[0].lm_head.weight).detach().clone()
        if name == "before_optimizer":
            grads = [p.grad for p in moment.model_parts[0].parameters() if p.grad is not None]
            self.norms.append(float(torch.nn.utils.get_total_norm([local(g) for g in grads])))


@pytest.mark.parametrize("nitp", [True, False])
def test_moments_of_a_run(nitp, tmp_path, corpus):
    config = trainer_config(tmp_path, corpus)
    config.checkpoint = CheckpointManager.Config(enable=True, interval=2)
    config.training.steps, config.training.max_norm = 3, 0.5
    config.nitp.enable = nitp
    if not nitp:
        config.loss = CrossEntropyLoss.Config(global_vocab_size=config.model_spec.model.vocab_size)
    diary = Diary()
    with running(config) as trainer:
        trainer.hooks.append(diary)
        trainer.train()
    step = ["begin_step", "end_micro_batch", "end_micro_batch", "before_optimizer", "end_step"]
    expected = [(name, n) for n in (1, 2, 3) for name in [*step, *(["saved"] if n > 1 else [])]]
    assert diary.pages == [*expected, ("close", 3)]
    for n in (1, 2, 3):
        before, after = diary.weights["before_optimizer", n], diary.weights["end_step", n]
        assert torch.equal(before, diary.weights["begin_step", n])
        assert not torch.equal(before, after)
    # Gradients are complete and clipped.
    assert diary.norms == pytest.approx([0.5] * 3, rel=1e-3)


def test_a_hook_that_fails_ends_the_run(tmp_path, corpus):
    class Failing(Hook):
        def before_optimizer(self, moment: Moment) -> None:
            raise RuntimeError("stop here")

    with running(trainer_config(tmp_path, corpus)) as trainer:
        trainer.hooks.append(Failing())
        weight = local(trainer.model_parts[0].lm_head.weight).detach().clone()
        with pytest.raises(RuntimeError, match="stop here"):
            trainer.train()
        assert torch.equal(weight, local(trainer.model_parts[0].lm_head.weight))
