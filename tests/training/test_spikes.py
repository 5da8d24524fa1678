"""A window's verdicts against a reimplementation in plain Python."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from nitp_titan.training.spikes import Window


def spikes_of(series: list[float], size: int, sigma: float) -> list[bool]:
    held: list[float] = []
    found = []
    for value in series:
        spike = False
        if len(held) >= size // 2:
            spike = value - statistics.fmean(held) > sigma * statistics.stdev(held)
        found.append(spike)
        if math.isfinite(value):
            held = [*held, value][-size:]
    return found


def drawn_series(seed: int) -> list[float]:
    generator = random.Random(seed)
    level, series = 5.0, []
    for _ in range(200):
        level += generator.choice([0.0, 0.0, 0.0, -0.1, 3.0 if generator.random() < 0.1 else 0.0])
        value = generator.gauss(level, 0.3)
        kind = generator.random()
        series.append(math.nan if kind < 0.02 else math.inf if kind < 0.04 else value * 4 if kind < 0.08 else value)
    return series


@pytest.mark.parametrize(("size", "sigma"), [(4, 1.0), (16, 3.0), (128, 6.0)])
@pytest.mark.parametrize("seed", range(3))
def test_verdicts_are_those_of_plain_python(size, sigma, seed):
    series, window = drawn_series(seed), Window(size, sigma, torch.device("cpu"))
    found = [bool(window.take(torch.tensor(value, dtype=torch.float64))) for value in series]
    expected = spikes_of(series, size, sigma)
    # Not a number is above nothing, and infinity above all: other reasons to skip are worse.
    assert found == expected
    assert any(spike for value, spike in zip(series, expected, strict=True) if math.isfinite(value))


def test_a_window_that_is_cleared_judges_nothing_until_it_is_half_full():
    window = Window(8, 1.0, torch.device("cpu"))
    values = [1.0, 1.1, 0.9, 1.0, 50.0]
    assert [bool(window.take(torch.tensor(v))) for v in values] == [False] * 4 + [True]
    window.clear()
    assert [bool(window.take(torch.tensor(v))) for v in values[-1:] + values[:4]] == [False] * 5
