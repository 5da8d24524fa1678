"""Steps with numbers that are not finite, or far off, leave no trace, and end a run or do not, as the job says."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nitp_titan.checkpoints.manager import CheckpointManager
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.nitp.dtensors import local
from nitp_titan.runs.steps import complete_steps
from nitp_titan.training import faults
from nitp_titan.training.errors import NotFinite
from nitp_titan.training.faults_config import FaultsConfig
from tests.helpers.commands import call, debug_job
from tests.helpers.faults import INF, NAN, Poison, differing, each_call, poison, tensors_of, whole_state
from tests.helpers.trainers import metric_lines, running, trainer_config

BAD = 3


def config_of(tmp_path, corpus, *, flavor="debug", implementation="foreach", steps=5, **options) -> Any:
    config = trainer_config(tmp_path, corpus, flavor=flavor, faults=FaultsConfig(**options))
    config.model_spec.model.layers = config.model_spec.model.layers[:2]  # of the experts' a dense block and one of them
    config.optimizer.implementation = implementation
    config.training.steps = steps
    # No step but the first and the last is logged.
    config.metrics.log_freq = steps
    return config


def states_of(config, *changes) -> list[dict[str, torch.Tensor]]:
    """Train; return the state at the start and after each step."""
    with running(config) as trainer:
        states = [whole_state(trainer)]
        for change in changes:
            change(trainer)
        each_call(trainer, "train_step", lambda: states.append(whole_state(trainer)))
        trainer.train()
    return states


def taken_back(step: int):
    """Have a trainer undo a step, by hand, and on the host."""

    def change(trainer: Any) -> None:
        before: dict[str, torch.Tensor] = {}
        original = trainer.train_step

        def train_step(batches):
            before.update(whole_state(trainer) if trainer.step == step else {})
            original(batches)
            if trainer.step != step:
                return
            # The same tensors again: what state_dict gives shares their memory.
            with torch.no_grad():
                for name, value in tensors_of(trainer):
                    local(value).copy_(before[name])

        trainer.train_step = train_step

    return change


@pytest.fixture(scope="module")
def undone(tmp_path_factory, corpus):
    """The states of runs whose step BAD was undone by hand."""
    made: dict[tuple[str, str], list[dict[str, torch.Tensor]]] = {}

    def get(flavor: str, implementation: str) -> list[dict[str, torch.Tensor]]:
        if (flavor, implementation) not in made:
            folder = tmp_path_factory.mktemp("undone")
            config = config_of(folder, corpus, flavor=flavor, implementation=implementation)
            made[flavor, implementation] = states_of(config, taken_back(BAD))
        return made[flavor, implementation]

    return get


@pytest.mark.parametrize(
    ("flavor", "implementation", "kind", "value", "micro_batch"),
    [
        ("debug_moe", "fused", "gradient", NAN, 0),
        ("debug_moe", "fused", "activation", INF, 1),
        ("debug_moe", "foreach", "loss", NAN, 0),
        ("debug", "foreach", "gradient", -INF, 1),
        ("debug", "for-loop", "activation", NAN, 0),
    ],
)
def test_a_skipped_step_leaves_no_trace(flavor, implementation, kind, value, micro_batch, tmp_path, corpus, undone):
    config = config_of(tmp_path, corpus, flavor=flavor, implementation=implementation, on_nonfinite="skip")
    fault = Poison([BAD], kind, value, micro_batch=micro_batch)
    states = states_of(config, lambda trainer: poison(trainer, fault))
    assert differing(states[BAD], states[BAD - 1]) == []
    assert all(differing(states[step], states[step - 1]) for step in (1, 2, 4, 5))
    expected = undone(flavor, implementation)
    assert differing(states[-1], expected[-1]) == []
    # The figures of the last step are of its own numbers alone.
    [last] = [line for line in metric_lines(tmp_path) if line["step"] == 5]
    assert last["faults/skipped_steps"] == 1
    assert None not in last.values()


def test_a_run_without_a_bad_step_is_what_it_is_without_the_guard(tmp_path, corpus, monkeypatch):
    def run(name: str) -> dict[str, torch.Tensor]:
        config = config_of(tmp_path / name, corpus, flavor="debug_moe", implementation="fused", steps=3)
        return states_of(config)[-1]

    guarded = run("guarded")
    without_guard(monkeypatch)
    assert differing(guarded, run("unguarded")) == []


def without_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("begin_step", "_decide", "take_loss"):
        monkeypatch.setattr(faults.StepGuard, name, {"take_loss": lambda _, loss, logged: loss}.get(name, _nothing))
    monkeypatch.setattr(faults.RouterState, "restore_where", _nothing)


def _nothing(*args: Any) -> None:
    pass


class Operators(TorchDispatchMode):
    """Counts the operators inside by which a host waits for its device."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.is_nonzero,
        ):
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_the_host_waits_no_more_often_than_without_the_guard(tmp_path, corpus, monkeypatch):
    def waits(name: str) -> Counter[str]:
        options = {"loss_spike_sigma": 6.0, "grad_norm_spike_sigma": 6.0}
        config = config_of(tmp_path / name, corpus, flavor="debug_moe", implementation="fused", steps=9, **options)
        with running(config) as trainer:
            batches = trainer.batch_generator(trainer.dataloader)
            for trainer.step in (2, 3):  # neither is logged
                with Operators() as operators:
                    trainer.train_step(batches)
            return operators.calls

    guarded = waits("guarded")
    without_guard(monkeypatch)
    assert guarded == waits("unguarded")


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_ends_the_run(kind, implementation, tmp_path, corpus):
    config = config_of(tmp_path, corpus, flavor="debug_moe", implementation=implementation, steps=9)
    config.metrics.log_freq = 4
    config.checkpoint = CheckpointManager.Config(enable=True, interval=2)
    states = []
    with running(config) as trainer:
        poison(trainer, Poison([BAD], kind))
        each_call(trainer, "train_step", lambda: states.append(whole_state(trainer)))
        with pytest.raises(NotFinite) as caught:
            trainer.train()
        states.append(whole_state(trainer))
    # Noticed at step 4, whose own numbers are good, and before its checkpoint.
    assert len(states) == 4
    assert differing(states[1], states[2]) == differing(states[1], states[3]) == []
    assert complete_steps(tmp_path / "checkpoint") == [2]
    assert str(caught.value) == (
        f"step 3: its {kind} is not finite, first on rank 0; no weight has changed since the step before, and the last "
        f'checkpoint is {tmp_path / "checkpoint" / "step-2"} (faults.on_nonfinite = "skip" would go on without it)'
    )


def test_the_last_step_of_a_run_that_saves_and_logs_nothing_is_looked_at(tmp_path, corpus):
    config = config_of(tmp_path, corpus, steps=2)
    config.metrics.log_freq = 7
    with running(config) as trainer:
        poison(trainer, Poison([2], "loss", INF))
        with pytest.raises(NotFinite, match=r"step 2: its loss is not finite.*there is no checkpoint before it"):
            trainer.train()


def test_a_bad_step_is_stopped_before_its_own_checkpoint(tmp_path, corpus):
    config = config_of(tmp_path, corpus, steps=4)
    config.metrics.log_freq = 7
    config.checkpoint = CheckpointManager.Config(enable=True, interval=1)
    with running(config) as trainer:
        poison(trainer, Poison([2], "gradient"))
        with pytest.raises(NotFinite, match="step 2"):
            trainer.train()
        with pytest.raises(NotFinite, match="step 2"):
            trainer.checkpointer.save_now(trainer.step)
    assert complete_steps(tmp_path / "checkpoint") == [1]


def test_too_many_skips_in_a_row_end_the_run(tmp_path, corpus):
    config = config_of(tmp_path, corpus, steps=9, on_nonfinite="skip", max_skips_in_a_row=2)
    config.metrics.log_freq = 1
    with running(config) as trainer:
        poison(trainer, Poison([2, 3, 5, 6, 7, 8], "gradient"))
        with pytest.raises(NotFinite, match=r"step 5: .* the first of more than 2 skipped steps in a row"):
            trainer.train()
        assert trainer.step == 7
    assert [line["faults/skipped_steps"] for line in metric_lines(tmp_path)] == [0, 1, 2, 2, 3, 4]


def test_a_skipped_step_is_logged_as_it_is(tmp_path, corpus):
    config = config_of(tmp_path, corpus, flavor="debug_moe", steps=3, on_nonfinite="skip")
    config.nitp, config.metrics.log_freq = NITPConfig(geometry_freq=1), 1
    with running(config) as trainer:
        poison(trainer, Poison([2], "activation"))
        trainer.train()
    first, bad, last = metric_lines(tmp_path)
    assert None not in [*first.values(), *last.values()]
    tags = "loss_metrics/global_avg_loss loss_metrics/global_max_loss loss_metrics/ntp_loss loss_metrics/nitp_loss"
    for tag in (*tags.split(), "grad_norm", "geometry/effective_rank"):
        assert bad[tag] is None, tag
    assert bad["n_tokens_seen"] == 2 * first["n_tokens_seen"]


@pytest.mark.parametrize("key", ["loss_spike_sigma", "grad_norm_spike_sigma"])
def test_a_spike_is_skipped(key, tmp_path, corpus):
    config = config_of(tmp_path, corpus, steps=7, spike_window=8, **{key: 20.0})
    config.training.max_norm = 1e9
    fault = Poison([6], "loss" if key.startswith("loss") else "gradient", 1e6)
    states = states_of(config, lambda trainer: poison(trainer, fault))
    assert differing(states[6], states[5]) == []
    assert all(differing(states[step], states[step - 1]) for step in (1, 2, 3, 4, 5, 7))
    assert metric_lines(tmp_path)[-1]["faults/skipped_steps"] == 1


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_first_step_that_is_skipped_can_be_saved_and_resumed_from(implementation, tmp_path, corpus):
    def run(name: str, steps: int, *, poisoned: bool) -> dict[str, torch.Tensor]:
        config = config_of(
            tmp_path / name, corpus, flavor="debug_moe", implementation=implementation, steps=3, on_nonfinite="skip"
        )
        config.training.steps, config.lr_scheduler.total_steps = steps, 3
        config.checkpoint = CheckpointManager.Config(enable=True, interval=1, last_save_model_only=False)
        return states_of(config, *([lambda trainer: poison(trainer, Poison([1], "gradient"))] * poisoned))[-1]

    whole = run("whole", 3, poisoned=True)
    run("parts", 1, poisoned=True)
    assert differing(run("parts", 3, poisoned=False), whole) == []


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path, corpus):
    config = config_of(tmp_path, corpus, steps=3)
    config.checkpoint = CheckpointManager.Config(enable=True, interval=2)
    with running(config) as trainer:

        def spoil() -> None:
            if trainer.step == 2:
                with torch.no_grad():
                    trainer.model_parts[0].lm_head.weight.mul_(INF)

        each_call(trainer, "train_step", spoil)
        with pytest.raises(NotFinite, match="step 2: a weight is not finite, first on rank 0"):
            trainer.train()
    assert complete_steps(tmp_path / "checkpoint") == []


def test_a_command_ends_with_3_and_a_sentence(tmp_path):
    words = ("--training.steps=6", "--metrics.log_freq=10", "--model.shape.n_layers=2")
    done = call(*debug_job(tmp_path / "run", *words), entry=(sys.executable, "-m", "tests.helpers.poisoned_train"))
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("step 3: its gradient is not finite, first on rank 0; no weight has changed since")
    assert f"the last checkpoint is {tmp_path / 'run' / 'checkpoint' / 'step-2'}" in last
    assert complete_steps(tmp_path / "run" / "checkpoint") == [2]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("on_nonfinite", "ignore"),
        ("max_skips_in_a_row", 0),
        ("loss_spike_sigma", -1.0),
        ("grad_norm_spike_sigma", NAN),
        ("spike_window", 3),
    ],
)
def test_a_value_outside_its_range_is_refused(key, value):
    with pytest.raises(ValueError, match=f"faults.{key}: found"):
        FaultsConfig(**{key: value})
