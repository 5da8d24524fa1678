"""The rehearsal of a pipeline's first step leaves nothing behind."""

from __future__ import annotations

import contextlib
from pathlib import Path

from torchtitan.models.common.moe import MoE

from nitp_titan.titan.rehearsal import isolate_rehearsal
from tests.distributed.layouts import layout
from tests.distributed.parity import config_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.trainers import running


class Schedule:
    """Calls as torch's schedules do, before every step."""

    def __init__(self) -> None:
        self._has_backward = True
        self.rehearsals = 0
        self.known = (False, False)

    def _initialize_pp_stages(self, stages, args, kwargs, target, forward_known, backward_known, loss_kwargs=None):
        if not forward_known or backward_known != self._has_backward:
            self.rehearsals += 1
        return True, self._has_backward

    def step(self) -> None:
        self.known = self._initialize_pp_stages([], (), {}, None, *self.known, loss_kwargs={})


def test_only_a_rehearsal_is_isolated():
    schedule, isolated = Schedule(), []

    @contextlib.contextmanager
    def undone():
        yield
        isolated.append(schedule.rehearsals)

    isolate_rehearsal(schedule, undone)
    schedule.step()
    schedule.step()
    assert isolated == [1]
    schedule._has_backward = False  # a validation
    schedule.step()
    schedule.step()
    schedule._has_backward = True
    schedule.step()
    assert isolated == [1, 2, 3]


def count_tokens(folder: Path) -> list[float]:
    config = config_of(folder, layout("debug_moe", 2, pp=2, schedule="1F1B", local_batch_size=4))
    config.validator.enable = False
    with running(config) as trainer:
        batches = trainer.batch_generator(trainer.dataloader)
        trainer.step = 1
        # The optimizer clears the counters of the step.
        found: list[float] = []
        trainer.optimizers.step = lambda: found.extend(
            module.tokens_per_expert_E.sum().item()
            for part in trainer.model_parts
            for module in part.modules()
            if isinstance(module, MoE)
        )
        trainer.train_step(batches)
        return found


def test_expert_loads_count_every_token_once(tmp_path):
    loads = [load for rank in run_on_ranks(2, count_tokens, tmp_path) for load in rank]
    # Three blocks, 8 sequences of 64 tokens, 2 experts a token.
    assert loads == [8 * 64 * 2] * 3
