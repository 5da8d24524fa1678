"""Turns, medians and overheads: how variants are timed against each other.

Clocks, temperatures and neighbours drift over minutes. So the variants take turns, A B C, A B C, ...: each round has a
short run of each, what a round has in common cancels in its ratios, and the spread of the rounds tells what is left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Clock = Callable[[], float]
"""Returns the seconds at which all work given to the device so far is done."""


class Runner(Protocol):
    """What takes turns."""

    def run(self, steps: int) -> None:
        """Do a number of steps; the device may still be at work on them afterwards."""

    def release(self) -> None:
        """Give back the memory that only a step in progress needs, gradients above all."""


class TurnFailed(Exception):
    """A runner failed in its turn: ``name``; the cause is what it raised."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of several values."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarize at least one value."""
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])

    def to_json(self, digits: int = 4) -> dict[str, float]:
        return {name: round(getattr(self, name), digits) for name in ("median", "min", "max")}


def take_turns(
    runners: Mapping[str, Runner],
    *,
    rounds: int,
    steps: int,
    settle: int,
    clock: Clock,
    after_round: Callable[[dict[str, list[float]]], None] = lambda seconds: None,
) -> dict[str, list[float]]:
    """Time every runner once a round, one after the other, in the order given.

    Args:
        rounds: how many turns each one has.
        steps: steps of a turn that are timed, together: a device is not waited for in between.
        settle: steps of a turn before them that are not.
        after_round: is called with the seconds a step of every turn so far.

    Returns:
        name -> seconds a step, one for each round.

    Raises:
        TurnFailed: a runner raised something.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            try:
                seconds[name].append(_turn(runner, steps, settle, clock))
            except Exception as error:
                raise TurnFailed(name) from error
        after_round(seconds)
    return seconds


def take_turns_or_drop_out(
    runners: Mapping[str, Runner],
    drop: Callable[[str, BaseException], None],
    *,
    before: Callable[[], None] = lambda: None,
    **options: Any,
) -> dict[str, list[float]]:
    """``take_turns`` of the runners that last: if one fails, the others begin anew without it.

    Args:
        drop: is given the name of one that failed, and why; it takes it out of ``runners``, or raises.
        before: is called whenever they begin, when nothing holds a failure's memory any more.
        options: those of ``take_turns``.

    Returns:
        name -> seconds a step; nothing if none lasts.
    """
    while runners:
        before()
        try:
            return take_turns(runners, **options)
        except TurnFailed as turn:
            drop(turn.name, turn.__cause__ or turn)
    return {}


def _turn(runner: Runner, steps: int, settle: int, clock: Clock) -> float:
    runner.run(settle)
    begin = clock()
    runner.run(steps)
    seconds = (clock() - begin) / steps
    runner.release()
    return seconds


def overhead_percent(value: float, base: float) -> float:
    """Return by how many per cent ``value`` is above ``base``."""
    return 100 * (value / base - 1)


def overhead_of_medians(values: Sequence[float], base: Sequence[float]) -> float:
    """Return the overhead of the median over the median."""
    return overhead_percent(statistics.median(values), statistics.median(base))


def overhead_by_round(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Return the overhead of each round's value over the same round's base: what a whole round shares cancels."""
    return Spread.of(overhead_percent(value, b) for value, b in zip(values, base, strict=True))


class DeviceClock:
    """The wall clock, once the device and, where there are several, the other ranks are done.

    A single process on a CPU counts the processor's time that it had: what else runs on the machine would otherwise
    be most of what is measured.
    """

    def __init__(self, device_type: str):
        self._device_type = device_type

    @property
    def kind(self) -> str:
        """Name what it counts."""
        return "processor time" if self._device_type == "cpu" and not _several_ranks() else "wall clock"

    def __call__(self) -> float:
        import torch

        if self.kind == "processor time":
            return time.process_time()
        self._synchronize()
        if _several_ranks():
            torch.distributed.all_reduce(torch.zeros(1, device=self._device_type))
            self._synchronize()
        return time.perf_counter()

    def _synchronize(self) -> None:
        import torch

        if self._device_type != "cpu":
            torch.get_device_module(self._device_type).synchronize()


def _several_ranks() -> bool:
    import torch

    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
