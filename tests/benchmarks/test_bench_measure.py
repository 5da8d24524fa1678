"""Turns, with a clock that only the runners move, and the arithmetic of medians and overheads."""

from __future__ import annotations

import pytest

from benchmarks import measure
from benchmarks.measure import (
    DeviceClock,
    Spread,
    TurnFailed,
    overhead_by_round,
    overhead_of_medians,
    overhead_percent,
    take_turns,
    take_turns_or_drop_out,
)


class FakeClock:
    def __init__(self):
        self.now = 0.0
        self.events: list[str] = []

    def __call__(self) -> float:
        self.events.append("clock")
        return self.now


class FakeRunner:
    """Takes a fixed time a step, longer each round by a drift that all share."""

    def __init__(self, name: str, seconds: float, clock: FakeClock):
        self.name, self.seconds, self.clock = name, seconds, clock

    def run(self, steps: int) -> None:
        self.clock.events.append(f"{self.name}{steps}")
        self.clock.now += steps * self.seconds

    def release(self) -> None:
        self.clock.events.append(f"{self.name} releases")


def test_turns_alternate_in_the_order_given():
    clock = FakeClock()
    runners = {name: FakeRunner(name, 1.0, clock) for name in ("B", "A")}
    take_turns(runners, rounds=3, steps=4, settle=2, clock=clock)
    turn = ["{0}2", "clock", "{0}4", "clock", "{0} releases"]
    assert clock.events == [event.format(name) for _ in range(3) for name in "BA" for event in turn]


def test_others_begin_anew_without_one_that_fails():
    clock, befores, dropped = FakeClock(), [], []
    runners = {name: FakeRunner(name, 1.0, clock) for name in ("A", "B", "C")}

    def fail_late(steps: int) -> None:
        if clock.now > 3:
            raise OSError("no room")
        clock.now += steps

    def fail(steps: int) -> None:
        raise OSError("at once")

    runners["A"].run, runners["C"].run = fail_late, fail

    def drop(name: str, error: BaseException) -> None:
        dropped.append((name, str(error)))
        del runners[name]

    options = {"rounds": 2, "steps": 1, "settle": 0, "clock": clock, "before": lambda: befores.append(sorted(runners))}
    assert take_turns_or_drop_out(runners, drop, **options) == {"B": [1.0, 1.0]}
    assert dropped == [("C", "at once"), ("A", "no room")]
    assert befores == [["A", "B", "C"], ["A", "B"], ["B"]]
    runners["B"].run = fail
    assert take_turns_or_drop_out(runners, drop, **options) == {}


def test_seconds_are_those_of_a_timed_step():
    clock = FakeClock()
    runners = {"slow": FakeRunner("slow", 0.5, clock), "fast": FakeRunner("fast", 0.25, clock)}
    calls = []

    def after_round(seconds: dict[str, list[float]]) -> None:
        calls.append({name: list(values) for name, values in seconds.items()})
        for runner in runners.values():
            runner.seconds *= 2

    found = take_turns(runners, rounds=3, steps=4, settle=1, clock=clock, after_round=after_round)
    assert found == {"slow": [0.5, 1, 2], "fast": [0.25, 0.5, 1]}
    assert calls == [{name: values[:n] for name, values in found.items()} for n in (1, 2, 3)]


def test_spread():
    assert Spread.of([3, 1, 2]) == Spread(2, 1, 3)
    assert Spread.of([4, 1, 2, 3]) == Spread(2.5, 1, 4)
    assert Spread.of([1 / 3]).to_json() == {"median": 0.3333, "min": 0.3333, "max": 0.3333}


def test_overheads():
    assert overhead_percent(1.5, 1) == pytest.approx(50)
    base = [1.0, 2.0, 9.0]
    assert overhead_of_medians([4.0, 1.0, 3.0], base) == pytest.approx(50)
    by_round = overhead_by_round([1.1, 2.4, 9.0], base)
    assert (by_round.median, by_round.min, by_round.max) == pytest.approx((10, 0, 20))
    with pytest.raises(ValueError, match="argument 2 is longer"):
        overhead_by_round([1.0], base)


def test_what_a_round_shares_cancels_by_round():
    drift = [1.0, 5.0, 2.0, 3.0]
    base, more = [7 * d for d in drift], [7.07 * d for d in drift]
    found = overhead_by_round(more, base)
    assert (found.median, found.min, found.max) == pytest.approx((1, 1, 1))


def test_a_process_on_a_cpu_counts_its_own_time(monkeypatch):
    monkeypatch.setattr("time.process_time", lambda: 12.5)
    clock = DeviceClock("cpu")
    assert clock() == 12.5
    assert clock.kind == "processor time"
    monkeypatch.setattr(measure, "_several_ranks", lambda: True)
    assert clock.kind == "wall clock"
    monkeypatch.setattr(measure, "_several_ranks", lambda: False)
    assert DeviceClock("cuda").kind == "wall clock"


def test_a_failing_turn_says_whose_it_is():
    class Failing(FakeRunner):
        def run(self, steps: int) -> None:
            raise MemoryError("no room")

    clock = FakeClock()
    runners = {"A": FakeRunner("A", 1.0, clock), "B": Failing("B", 1.0, clock)}
    with pytest.raises(TurnFailed) as failure:
        take_turns(runners, rounds=1, steps=1, settle=1, clock=clock)
    assert failure.value.name == "B"
    assert isinstance(failure.value.__cause__, MemoryError)
