"""Runs on gloo ranks that are stopped and go on, against runs that are not: bit for bit on the same layout.

``RESUME_LAYOUTS=all`` takes every layout of the parity table.
"""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import pytest

from tests.distributed.drawn import drawn
from tests.distributed.layouts import LAYOUTS, ZERO_BUBBLE, Layout, layout
from tests.distributed.resume import BEFORE, LAST, STEPS, Left, gone_on, logged, not_stopped, stopped_and_not
from tests.helpers.ranks import run_on_ranks

ASYNC, SYNC = "async", "disabled"
ROWWISE = "rowwise_with_gw_hp"

CHOSEN = [
    (layout("debug", 2), ASYNC, "none"),
    (layout("debug", 4, replicate=2, ac="selective"), SYNC, "none"),
    (layout("debug", 2, tp=2), LAST, ROWWISE),
    (layout("debug", 2, cp=2), ASYNC, "none"),
    (layout("debug_moe", 2, ep=2, local_batch_size=2), ASYNC, "none"),
    (layout("debug", 2, pp=2, schedule=ZERO_BUBBLE, local_batch_size=4), LAST, "none"),
    (layout("debug", 4, pp=2, tp=2, schedule="1F1B"), ASYNC, "none"),
    *((one, SYNC, "none") for one in drawn(18, 2, ranks=(2,), models=("debug", "debug_moe", "qwen3"))),
]
if os.environ.get("RESUME_LAYOUTS") == "all":
    CHOSEN += [(one, (SYNC, ASYNC, LAST)[number % 3], "none") for number, one in enumerate(LAYOUTS)]


@pytest.mark.parametrize(("layout", "mode", "recipe"), CHOSEN, ids=lambda part: str(part))
def test_a_resumed_run_is_the_run(layout: Layout, mode: str, recipe: str, tmp_path: Path, corpus: Path):
    ranks = run_on_ranks(layout.ranks, stopped_and_not, tmp_path, corpus, layout, mode, recipe)
    later = range(BEFORE + 1, STEPS + 1)
    for rank, (whole, resumed) in enumerate(ranks):
        assert {f".random.rank_{rank}.{name}" for name in ("python", "numpy", "torch_cpu")} < whole.state.keys()
        differing = {name for name, value in whole.state.items() if resumed.state[name] != value}
        assert (differing, resumed.state.keys()) == (set(), whole.state.keys())
        assert resumed.draws == {step: whole.draws[step] for step in later}
        assert resumed.rows == {step: whole.rows[step] for step in later}
        assert resumed.tokens == whole.tokens
    # Ranks are in states of their own, so that none can have another's.
    assert len({str(whole.draws[STEPS]) for whole, _ in ranks}) == layout.ranks
    lines = logged(tmp_path / "whole")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert logged(tmp_path / "resumed") == (lines if mode == LAST else lines[BEFORE:])


FROM_TO = [
    (layout("debug", 1), layout("debug", 2)),
    (layout("debug", 4, replicate=2), layout("debug", 1)),
    (layout("debug", 2, pp=2, schedule="1F1B"), layout("debug", 2, cp=2)),
    (layout("debug_moe", 2, ep=2), layout("debug_moe", 4, tp=2)),
]


@pytest.mark.parametrize(("before", "after"), FROM_TO, ids=str)
def test_on_another_layout_the_run_has_the_same_documents_and_losses(before, after, tmp_path: Path, corpus: Path):
    whole = run_on_ranks(before.ranks, not_stopped, tmp_path / "whole", corpus, before)
    other = run_on_ranks(after.ranks, gone_on, tmp_path / "whole", tmp_path / "other", corpus, after)
    for step in range(BEFORE + 1, STEPS + 1):
        assert sequences(other, step) == sequences(whole, step)
    assert {run.tokens for run in whole} == {run.tokens for run in other}
    pairs = list(zip(logged(tmp_path / "other"), logged(tmp_path / "whole", after=BEFORE), strict=True))
    assert len(pairs) == STEPS - BEFORE
    for found, expected in pairs:
        exactly, nearly = (
            ("step", "n_tokens_seen", "lr/AdamW"),
            ("loss_metrics/global_avg_loss", "loss_metrics/nitp_loss"),
        )
        assert [found[tag] for tag in exactly] == [expected[tag] for tag in exactly]
        for tag in nearly:
            assert found[tag] == pytest.approx(expected[tag], rel=1e-5)


def sequences(ranks: list[Left], step: int) -> list[tuple[int, ...]]:
    """Return the different sequences of a step's global batch: ranks that share a batch have the same ones."""
    return sorted(set(chain.from_iterable(run.rows[step] for run in ranks)))
