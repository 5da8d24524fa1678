"""Slices against a model whose step is linear in its depth."""

from __future__ import annotations

import pytest

from benchmarks.depth import Slice, extrapolate


def step_ms(layers: int) -> float:
    return 10 + 3 * layers


def test_a_linear_model_is_found_exactly():
    found = extrapolate(
        Slice(layers=2, step_ms=step_ms(2)),
        Slice(layers=4, step_ms=step_ms(4)),
        full_layers=24,
        step_ms={"nitp": step_ms(4) + 0.5, "mtp": step_ms(4) + 8.2},
    )
    assert found["layer_ms"] == pytest.approx(3)
    assert found["full_step_ms"] == pytest.approx(step_ms(24)) == pytest.approx(82)
    assert found["extra_ms"] == pytest.approx({"nitp": 0.5, "mtp": 8.2})
    assert found["overhead_percent"] == pytest.approx({"nitp": 100 * 0.5 / 82, "mtp": 10}, abs=1e-4)
    assert found["arithmetic"] == [
        "a block: (22.000 - 16.000) ms / 2 = 3.000 ms",
        "ntp, 24 layers: 22.000 + 20 x 3.000 = 82.000 ms",
        "nitp, 24 layers: + (22.500 - 22.000) = +0.500 ms of 82.000 ms = +0.61 %",
        "mtp, 24 layers: + (30.200 - 22.000) = +8.200 ms of 82.000 ms = +10.00 %",
    ]


def test_the_slice_may_be_the_whole_model():
    found = extrapolate(Slice(layers=1, step_ms=13), Slice(layers=4, step_ms=22), full_layers=4, step_ms={"x": 23.1})
    assert found["overhead_percent"]["x"] == pytest.approx(5)


@pytest.mark.parametrize(("shallow", "deep"), [(4, 4), (4, 2), (0, 2), (2, 25)])
def test_depths_that_do_not_rise(shallow, deep):
    with pytest.raises(ValueError, match="expected to rise"):
        extrapolate(Slice(layers=shallow, step_ms=1), Slice(layers=deep, step_ms=2), full_layers=24, step_ms={})


def test_noise_is_told():
    with pytest.raises(ValueError, match="too noisy"):
        extrapolate(Slice(layers=2, step_ms=2), Slice(layers=4, step_ms=1.9), full_layers=24, step_ms={})
