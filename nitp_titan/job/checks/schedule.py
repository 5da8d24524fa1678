"""Steps against one another: learning-rate schedule, the run's length, NITP's start; and a resume that changes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from nitp_titan.job.checks.initial import latest_step
from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote

Get = Callable[[str, str], Any]

_CURVE = ("warmup_steps", "decay_ratio", "decay_type", "min_lr_factor")
# What an optimizer's state brings back, whatever the job says.
_RESTORED = ("beta1", "beta2", "eps", "weight_decay")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of a learning-rate schedule's parts, as TorchTitan cuts them to fit."""

    total: int
    warmup: int
    decay: int

    @classmethod
    def of(cls, get: Get) -> Schedule:
        """Return the schedule of a job; ``get(table, key)`` returns its values."""
        total = _length(get)
        warmup, ratio = min(get("lr_scheduler", "warmup_steps"), total), get("lr_scheduler", "decay_ratio")
        decay = total - warmup if ratio is None else min(round(total * ratio), total - warmup)
        return cls(total, warmup, decay)

    @property
    def stable(self) -> int:
        """Steps at the peak."""
        return self.total - self.warmup - self.decay


def _length(get: Get) -> int:
    set_to = get("lr_scheduler", "total_steps")
    return get("training", "steps") if set_to is None else set_to


def check_steps(draft: Draft) -> Iterator[Problem]:
    """A run does not end with steps whose learning rate is 0, in which it would learn nothing."""
    total, steps = draft.get("lr_scheduler", "total_steps"), draft.get("training", "steps")
    if total is None or not 0 < total < steps or draft.get("lr_scheduler", "min_lr_factor") > 0:
        return
    if Schedule.of(draft.get).decay > 0:
        yield draft.problem(
            "lr_scheduler",
            "total_steps",
            f"found {total}, expected at least training.steps {steps}: the learning rate is 0 from step {total + 1} on",
            f"set total_steps = {steps}, or a min_lr_factor above 0, which later steps keep",
        )


def doubts(draft: Draft) -> Iterator[str]:
    """Yield what contradicts itself in a job that can run, a line each."""
    steps, length = draft.get("training", "steps"), _length(draft.get)
    schedule = Schedule.of(draft.get)
    if length < steps:
        end = draft.get("lr_scheduler", "min_lr_factor") if schedule.decay else 1
        yield (
            f"training.steps {steps} is more than lr_scheduler.total_steps {length}: later steps keep the last "
            f"learning rate, {end:g} of the peak"
        )
    warmup, ratio = draft.get("lr_scheduler", "warmup_steps"), draft.get("lr_scheduler", "decay_ratio")
    run = min(steps, length)
    if length > steps and schedule.decay:
        decaying = max(0, steps - (length - schedule.decay))
        what = f"{decaying:,} of its {schedule.decay:,} steps of decay are" if decaying else "its decay is not"
        yield f"training.steps {steps} ends a schedule of lr_scheduler.total_steps {length} early: {what} reached"
    if ratio and not schedule.decay and warmup < length:
        yield f"lr_scheduler.decay_ratio {ratio:g} of {length} steps is less than half a step: nothing decays"
    if warmup > length:
        yield f"lr_scheduler.warmup_steps {warmup} is more than the schedule's {length} steps: {length} are taken"
    elif warmup >= run:
        yield f"lr_scheduler.warmup_steps {warmup} takes all of the run's {run} steps: the rate only rises"
    elif ratio is not None and round(length * ratio) > schedule.decay:
        yield (
            f"lr_scheduler.decay_ratio {ratio:g} of {length} steps does not fit behind {warmup} warm-up steps: "
            f"{schedule.decay} steps decay"
        )
    start = draft.get("nitp", "start_step")
    if draft.get("nitp", "enable") and start >= steps > 0:
        when = "in its last step alone" if start == steps else "never"
        yield f"nitp.start_step {start} is not before the run's end, training.steps {steps}: NITP trains {when}"


def resume_doubts(draft: Draft) -> Iterator[str]:
    """Yield what a run that goes on from its folder's checkpoint would change in its schedule, or not take over."""
    folder = draft.get("job", "dump_folder")
    before = _resolved_before(Path(folder))
    if not draft.get("checkpoint", "enable") or before is None:
        return
    if latest_step(Path(folder, draft.get("checkpoint", "folder"))) is None:
        return

    def then(table: str, key: str) -> Any:
        value = before.get(table, {}).get(key, draft.get(table, key))
        return None if value == "none" else value

    changes = [
        (f"{table}.{key}", then(table, key), draft.get(table, key))
        for table, key in [*(("lr_scheduler", key) for key in _CURVE), ("optimizer", "lr")]
    ]
    changes.append(("its length in steps", _length(then), _length(draft.get)))
    if changed := [f"{name} {_plain(old)} -> {_plain(new)}" for name, old, new in changes if old != new]:
        yield f"{folder} goes on with another learning-rate schedule: {', '.join(changed)}"
    kept = [key for key in _RESTORED if then("optimizer", key) != draft.get("optimizer", key)]
    if kept and "optimizer" not in draft.get("checkpoint", "exclude_from_loading"):
        said = ", ".join(f"optimizer.{key} {_plain(draft.get('optimizer', key))}" for key in kept)
        stay = ", ".join(_plain(then("optimizer", key)) for key in kept)
        yield f"{said} is ignored: {folder} goes on with its checkpoint's {stay}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else quote(value)


def _resolved_before(folder: Path) -> Mapping[str, Any] | None:
    try:
        return tomli.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
