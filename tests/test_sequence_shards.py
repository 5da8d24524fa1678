"""The exchange of one row per neighbour, against a search for every token's successor."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nitp_titan.sequence_shards import SequenceShards, exchange_plan, runs_of_ranks, take_rows
from tests.ranks import run_on_ranks

SPREADS = [
    {"context": context, "tensor": tensor, "head_tail": head_tail}
    for context in (1, 2, 3, 4)
    for tensor in (1, 2, 3)
    for head_tail in (False, True)
    if context > 1 or not head_tail
]


def spread_id(spread: dict) -> str:
    return "-".join(f"{name}={value}" for name, value in spread.items())


def positions_of_ranks(length: int, spread: dict) -> list[list[int]]:
    return [[p for run in runs for p in run] for runs in runs_of_ranks(length, **spread)]


@pytest.mark.parametrize("spread", SPREADS, ids=spread_id)
def test_runs_are_those_that_torch_cuts(spread):
    """torch's balancer, then equal parts: for context parallelism, then for sequence parallelism."""
    from torch.distributed.tensor.experimental._attention import _HeadTailLoadBalancer

    length = 2 * spread["context"] * spread["tensor"] * 3
    order = torch.arange(length)
    if spread["head_tail"]:
        order = _HeadTailLoadBalancer(length, spread["context"], "cpu")._generate_indices()[0]
    expected = [part for of_context in order.chunk(spread["context"]) for part in of_context.chunk(spread["tensor"])]
    assert positions_of_ranks(length, spread) == [part.tolist() for part in expected]


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("spread", SPREADS, ids=spread_id)
def test_every_token_meets_its_successor_and_only_seams_are_exchanged(spread, rows):
    length = spread["context"] * spread["tensor"] * 2 * rows
    held = positions_of_ranks(length, spread)
    plans = [exchange_plan(length, rank, **spread) for rank in range(len(held))]
    for rank, (mine, plan) in enumerate(zip(held, plans, strict=True)):
        # What all_to_all_single delivers: from each rank in turn, its rows for this one in the order it sends them.
        arrived = []
        for other, sender in zip(held, plans, strict=True):
            before = sum(sender.send_counts[:rank])
            arrived += [other[row] for row in sender.sent[before : before + sender.send_counts[rank]]]
        assert arrived == [mine[row] + 1 for row in plan.rows]
        assert sum(plan.receive_counts) == len(plan.rows)

        successors = dict(zip(plan.rows, arrived, strict=True))
        for row, position in enumerate(mine):
            if row not in plan.ends:
                assert mine[row + 1] == position + 1
            elif position == length - 1:
                assert row not in successors
            else:
                assert successors[row] == position + 1
        assert len(plan.rows) <= (2 if spread["head_tail"] else 1) + 1


def exchange(length: int, spread: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rank = dist.get_rank()
    shards = SequenceShards(**spread, rank=rank, group=dist.group.WORLD)
    mine = positions_of_ranks(length, spread)[rank]
    z_BLD = torch.stack([torch.tensor(mine).double(), 100 + torch.tensor(mine).double()])[:, :, None].repeat(1, 1, 3)
    z_BLD.requires_grad_()
    plan = shards.plan(len(mine))
    next_BKD = shards.next_rows(z_BLD, plan)
    # A gradient that says where it came from.
    (next_BKD * take_rows(z_BLD.detach(), plan.rows)).sum().backward()
    return take_rows(z_BLD, plan.rows).detach(), next_BKD.detach(), z_BLD.grad


@pytest.mark.parametrize("head_tail", [False, True])
def test_rows_and_gradients_travel_between_ranks(head_tail):
    length, spread = 24, {"context": 2, "tensor": 2, "head_tail": head_tail}
    held = positions_of_ranks(length, spread)
    results = run_on_ranks(4, exchange, length, spread)
    for mine, (own, following, grad) in zip(held, results, strict=True):
        torch.testing.assert_close(following, own + 1, rtol=0, atol=0)
        # The gradient of the first row of a run is what its predecessor, on another rank, multiplied it with.
        starts = [row for row, position in enumerate(mine) if position and position - 1 not in mine]
        for row, position in enumerate(mine):
            is_sent = row in starts
            expected = torch.tensor([position - 1.0, 100 + position - 1.0]).double() if is_sent else torch.zeros(2)
            torch.testing.assert_close(grad[:, row], expected.double()[:, None].expand(2, 3), rtol=0, atol=0)


def test_sequence_that_does_not_divide_is_an_error():
    with pytest.raises(AssertionError, match="a sequence of 10 over 2 x 2 ranks"):
        runs_of_ranks(10, context=2, tensor=2, head_tail=False)
