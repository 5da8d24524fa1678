"""The host does not wait for the copies of a step's batches, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torchtitan.components.loss import CrossEntropyLoss

from nitp_titan.training import copies
from nitp_titan.training.copies import CopiesWithoutWaiting
from tests.helpers.trainers import running, trainer_config

META = torch.device("meta")


class Recorder(torch.overrides.TorchFunctionMode):
    """Notes, under another mode, how ``to`` is called in the end."""

    def __init__(self):
        super().__init__()
        self.seen: list[bool] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to:
            self.seen.append((kwargs or {}).get("non_blocking", False))
        return func(*args, **(kwargs or {}))


def test_copies_to_a_device_do_not_wait():
    x = torch.ones(3)
    with Recorder() as recorder:
        x.to(META)
        with CopiesWithoutWaiting() as mode:
            assert x.to(META).device == META
            x.to(torch.float64)
            x.to(torch.device("cpu"))
            x.to(META).to(META)  # the second is on the device already
            with mode.paused():
                x.to(META)
            x.to(META)
        x.to(META)
    assert recorder.seen == [False, True, False, False, True, False, False, True, False]


def test_a_failure_inside_leaves_no_mode_behind():
    mode = CopiesWithoutWaiting()
    with pytest.raises(RuntimeError, match="inside"), mode, mode.paused():
        raise RuntimeError("inside")
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("nitp", [True, False])
def test_every_copy_of_a_step_is_one(nitp, tmp_path, corpus, monkeypatch):
    config = trainer_config(tmp_path, corpus)
    config.nitp.enable = nitp
    if not nitp:
        config.loss = CrossEntropyLoss.Config(global_vocab_size=config.model_spec.model.vocab_size)
    # As if the CPU that trains here were a device of its own, to which token ids and counts are copied.
    monkeypatch.setattr(copies, "_leaves_the_cpu", lambda tensor, target: tensor.dtype == torch.int64)
    with running(config) as trainer:
        batches = trainer.batch_generator(trainer.dataloader)
        trainer.step = 1
        inside: list[int] = []
        forward = trainer.fwd_bwd_fn
        monkeypatch.setattr(trainer, "fwd_bwd_fn", lambda *args, **kwargs: _noted(inside, forward, *args, **kwargs))
        with Recorder() as recorder:
            trainer.train_step(batches)
    # A token count; of each of two micro-batches inputs, positions and labels.
    assert sum(recorder.seen) == 1 + 2 * 3
    # The model itself sees no mode of ours.
    assert inside == [1, 1]


def _noted(inside, forward, *args, **kwargs):
    inside.append(len(torch.overrides._get_current_function_mode_stack()))
    return forward(*args, **kwargs)
