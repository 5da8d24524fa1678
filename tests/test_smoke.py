"""The smoke job (``make smoke``): what it takes for a failure, and what it leaves (``tests/smoke.py``)."""

from __future__ import annotations

import json
import math
import sys

import pytest

from tests import smoke
from tests.helpers.events import write_events

FALLING = {tag: [(1, 2.0), (2, 1.0)] for tag in [*smoke.TAGS, "moe/max_load"]}
TOTAL = smoke.LOSSES[0]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, None),
        ({TOTAL: [(1, 2.0), (2, 2.0)]}, f"{TOTAL} did not fall: 2.0000 -> 2.0000"),
        ({TOTAL: [(1, 2.0), (2, math.nan)]}, f"{TOTAL} is not finite: [2.0, nan]"),
        ({"moe/max_load": []}, "no tag moe/max_load"),
    ],
)
def test_a_run_is_well_when_every_tag_is_there_and_its_losses_fell(tmp_path, changed, problem):
    run = write_events(tmp_path, FALLING | changed)
    assert smoke.problems_of(run, [*smoke.TAGS, "moe/max_load"]) == ([problem] if problem else [])


def test_a_run_without_events_is_not_well(tmp_path):
    (problem,) = smoke.problems_of(tmp_path, smoke.TAGS)
    assert str(tmp_path) in problem


def test_a_run_that_ends_with_an_error_shows_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setitem(smoke.MODES, "eager", ["--model.flavour", "x"])
    problems = smoke.run_job("debug", "eager", 1, tmp_path)
    assert problems[0] == f"exit code 2; the end of {tmp_path / 'debug-eager.log'}:"
    assert "--model.flavour" in "\n".join(problems[1:])


def test_the_verdicts_are_written_after_each_run_and_one_failure_fails_all(tmp_path, monkeypatch):
    written = []

    def run_job(job, mode, steps, out):
        assert (steps, out) == (7, tmp_path)
        file = out / "smoke.json"
        written.append(len(json.loads(file.read_text())) if file.exists() else 0)
        return ["it broke"] if (job, mode) == ("debug_moe", "eager") else []

    monkeypatch.setattr(smoke, "run_job", run_job)
    monkeypatch.setattr(sys, "argv", ["smoke", "--steps", "7", "--out", str(tmp_path)])
    assert smoke.main() == 1
    assert written == [0, 1, 2, 3]
    verdicts = json.loads((tmp_path / "smoke.json").read_text())
    assert verdicts == {
        "debug-eager": [],
        "debug-compiled": [],
        "debug_moe-eager": ["it broke"],
        "debug_moe-compiled": [],
    }
    monkeypatch.setattr(smoke, "run_job", lambda *_: [])
    assert smoke.main() == 0
