"""Every token's successor, with one row exchanged per neighbour, against a search for it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nitp_titan.nitp.sequence_shards import SequenceShards, exchange_plan, runs_of_ranks, take_rows
from tests.helpers.ranks import run_on_ranks

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


def successors(length: int, spread: dict, chunk_tokens: int) -> tuple[torch.Tensor, ...]:
    """This rank's tokens of two sequences, what is read as their successors by chunks, which of them have one.

    And the tokens' gradient of the sum of successors, each times its predecessor.
    """
    several = spread["context"] * spread["tensor"] > 1
    rank = dist.get_rank() if several else 0
    shards = SequenceShards(**spread, rank=rank, group=dist.group.WORLD if several else None)
    mine = torch.tensor(positions_of_ranks(length, spread)[rank]).double()
    z_BLD = torch.stack([mine, 100 + mine])[:, :, None].repeat(1, 1, 3).requires_grad_()
    found, rows = shards.successors(z_BLD), 2 * len(mine)
    chunks = [slice(start, min(start + chunk_tokens, rows)) for start in range(0, rows, chunk_tokens)]
    followed_T = shards.followed(torch.ones(2, len(mine), dtype=torch.bool)).flatten()
    z_TD, next_TD = z_BLD.detach().flatten(0, 1), torch.cat([found.of(chunk) for chunk in chunks])
    (next_TD[followed_T] * z_TD[followed_T]).sum().backward()
    return z_TD, next_TD.detach(), followed_T, z_BLD.grad.flatten(0, 1)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 6, 7, 1000])
@pytest.mark.parametrize(("tensor", "head_tail"), [(1, False), (1, True), (2, False), (2, True)])
def test_chunks_of_successors_across_ranks(tensor, head_tail, chunk_tokens):
    spread = {"context": 2, "tensor": tensor, "head_tail": head_tail}
    length, ends = 24, 0
    for z_TD, next_TD, followed_T, grad_TD in run_on_ranks(2 * tensor, successors, length, spread, chunk_tokens):
        assert torch.equal(followed_T, z_TD[:, 0] % 100 != length - 1)
        assert torch.equal(next_TD[followed_T], z_TD[followed_T] + 1)
        assert torch.equal(grad_TD, torch.where(z_TD % 100 == 0, 0, z_TD - 1))
        ends += int((~followed_T).sum())
    assert ends == 2


@pytest.mark.parametrize("chunk_tokens", [1, 5, 12, 24, 1000])
def test_chunks_of_successors_of_whole_sequences(chunk_tokens):
    z_TD, next_TD, followed_T, grad_TD = successors(12, {"context": 1, "tensor": 1, "head_tail": False}, chunk_tokens)
    assert (~followed_T).nonzero().flatten().tolist() == [11, 23]
    assert torch.equal(next_TD[followed_T], z_TD[followed_T] + 1)
    assert torch.equal(grad_TD, torch.where(z_TD % 100 == 0, 0, z_TD - 1))


def test_successors_inside_a_sequence_are_not_copied():
    z_BLD = torch.randn(2, 12, 3)
    found = SequenceShards().successors(z_BLD)
    storages = [found.of(chunk).untyped_storage().data_ptr() for chunk in (slice(0, 10), slice(10, 20))]
    assert storages == [z_BLD.untyped_storage().data_ptr()] * 2
