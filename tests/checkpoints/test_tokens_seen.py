"""The count of all ranks' tokens, and each rank's share of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nitp_titan.checkpoints.tokens_seen import TokensSeen


def counters(ranks: int) -> list[TokensSeen]:
    def dims(rank: int) -> Any:
        mesh = SimpleNamespace(size=lambda: ranks, get_local_rank=lambda: rank)
        return SimpleNamespace(get_optional_mesh=lambda name: {"loss": mesh if ranks > 1 else None}[name])

    return [TokensSeen(dims(rank)) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("total", [0, 1, 512, 515])
def test_shares_add_up_and_stay_right(ranks, total):
    each = counters(ranks)
    own = [counter.share(total) for counter in each]
    assert sum(own) == total
    assert max(own) - min(own) <= 1
    assert {counter.of_all(count + 7) for counter, count in zip(each, own, strict=True)} == {total + 7 * ranks}


def test_a_count_of_one_rank_is_completed_by_the_data():
    # 2 ranks have counted 64 each, of 128 drawn.
    parts = [counter.share_of_one(64, drawn=128) for counter in counters(4)]
    assert parts == [(32, "counted on 2 ranks, as the data tell")] * 4
    assert counters(1)[0].share_of_one(128, drawn=128) == (128, "")
    # The data do not say: they were started afresh since, or are another loader's.
    for drawn in (0, 100):
        own, remark = counters(2)[1].share_of_one(64, drawn)
        assert own == 64
        assert remark == "as if counted on 2 ranks: this older checkpoint has one rank's count"
