"""Every layout of the table against one process. All layouts run on gloo as they are."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.batches import CUT, ROWS, SEQ_LEN, global_batch
from tests.distributed.layouts import LAYOUTS, Layout, layout
from tests.distributed.parity import TOLERANCES, Differences, References, Tolerances, compare, ratio


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_trains_as_one_process_does(layout: Layout, references: References, tmp_path):
    assert not list(compare(layout, tmp_path, references).problems(layout))


def test_documents_straddle_every_boundary():
    _, positions, labels = global_batch(0, 300)
    follows = (positions[:, 1:] == positions[:, :-1] + 1) & (labels[:, :-1] != -100)
    for boundary in range(CUT, SEQ_LEN, CUT):
        pairs = follows[:, boundary - 1]
        assert pairs.any()
        assert not pairs.all()
    counts = [len(set(labels[i : i + 2].eq(-100).sum(dim=1).tolist())) for i in range(0, ROWS, 2)]
    assert max(counts) > 1, "ranks have the same number of ignored labels"


def test_table_has_no_layout_twice():
    names = [str(layout) for layout in LAYOUTS]
    assert len(set(names)) == len(names)


def test_a_ratio_is_never_not_a_number():
    nan, inf = torch.nan, torch.inf
    error, size = torch.tensor([0.0, 1.0, 1.0, nan, 0.5, nan]), torch.tensor([0.0, 0.0, nan, 1.0, 2.0, 0.0])
    assert ratio(error, size).tolist() == [0, inf, inf, inf, 0.25, inf]


@pytest.mark.parametrize("field", ["first", "later", "validation", "gradient"])
@pytest.mark.parametrize("value", [0.5, torch.nan, torch.inf])
def test_a_difference_beyond_its_tolerance_is_a_problem(field: str, value: float):
    of = layout("debug", 2)
    first, later, gradient = TOLERANCES["debug"]
    fine = Differences(first, later, later.losses, gradient / 2, "w")
    assert not list(fine.problems(of))
    for worse in first._fields if field in ("first", "later") else ("",):
        off = getattr(fine, field)._replace(**{worse: value}) if worse else value
        assert isinstance(off, Tolerances | float)
        assert len(list(fine._replace(**{field: off}).problems(of))) == 1
