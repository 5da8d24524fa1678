"""The successor of every token of a sequence, which may be spread over ranks: one row from each neighbour.

Context parallelism gives a rank one run of a sequence, or, with the head-tail balancer, one from its head and one from
its tail; sequence parallelism then cuts what a context rank has into equal parts. Nearly every token's successor is the
next local row. Only the last token of a run has it elsewhere, and that one row is what is exchanged: never the whole
target, and nothing where the sequence is whole.
"""

# Shape suffixes: B = batch, L = local sequence, K = rows that are exchanged, D = model dim,
# T = local rows (B * L flattened), C = rows of a chunk

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class SequenceShards:
    """How sequences are spread over a group of ranks, which are numbered context-major.

    ``group`` has ``context * tensor`` ranks; it is None where there is one.
    """

    context: int = 1
    """Degree of context parallelism."""

    tensor: int = 1
    """Degree of tensor parallelism with sequence parallelism; 1 without the latter."""

    head_tail: bool = False
    """Whether the context ranks' parts are balanced: a chunk of the head and one of the tail."""

    rank: int = 0
    """This rank's number in ``group``."""

    group: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        return self.context * self.tensor

    def plan(self, local_length: int) -> ExchangePlan:
        """Return what this rank sends and receives for sequences of which it has ``local_length`` tokens."""
        return exchange_plan(
            local_length * self.ranks, self.rank, context=self.context, tensor=self.tensor, head_tail=self.head_tail
        )

    def next_rows(self, z_BLD: torch.Tensor, plan: ExchangePlan) -> torch.Tensor:
        """Return the successors (B, K, D) of ``plan.rows``, from the ranks that have them. Differentiable.

        A collective over ``group``: every rank of it calls this.
        """
        rows_KBD = take_rows(z_BLD, plan.sent).transpose(0, 1).contiguous()
        received_KBD = _Exchange.apply(rows_KBD, plan.send_counts, plan.receive_counts, self.group)
        return received_KBD.transpose(0, 1)

    def successors(self, z_BLD: torch.Tensor) -> Successors:
        """Return the successors of this rank's rows. A collective over ``group``, if there is one."""
        batch, length, _ = z_BLD.shape
        arrived: dict[int, torch.Tensor] = {}
        if self.ranks > 1:
            plan = self.plan(length)
            next_BKD = self.next_rows(z_BLD, plan)
            if next_BKD.requires_grad and not plan.rows:
                # A rank that gets no row has a part in the exchange's backward pass all the same.
                z_BLD = torch.cat([z_BLD, next_BKD], dim=1)
            arrived = {
                sequence * length + row: next_BKD[sequence, k : k + 1]
                for sequence in range(batch)
                for k, row in sorted(enumerate(plan.rows), key=lambda item: item[1])
            }
        return Successors(z_BLD.flatten(0, 1), arrived)

    def followed(self, mask_BL: torch.Tensor) -> torch.Tensor:
        """Return the mask, False where a sequence ends: nothing follows there."""
        plan = self.plan(mask_BL.shape[1])
        mask_BL = mask_BL.clone()
        for row in set(plan.ends) - set(plan.rows):
            mask_BL[:, row] = False
        return mask_BL


@dataclass(frozen=True)
class Successors:
    """z at t + 1 for the rows t of a rank: read where it lies, with no shifted copy of z but for a chunk at a seam."""

    z_TD: torch.Tensor

    arrived: dict[int, torch.Tensor]
    """The successors (1, D) that another rank had, by the row (of T, in their order) that they follow."""

    def of(self, chunk: slice) -> torch.Tensor:
        """Return the successors (C, D) of a chunk of rows; that of a sequence's last row is another sequence's row."""
        row, parts = chunk.start, []
        for seam, successor in self.arrived.items():
            if row <= seam < chunk.stop:
                parts += [self.z_TD[row + 1 : seam + 1], successor]
                row = seam + 1
        parts.append(self.z_TD[row + 1 : chunk.stop + 1])
        if row < chunk.stop == len(self.z_TD):
            # Nothing follows: one row is as good as another, and the chunk keeps the length that is compiled.
            parts.append(self.z_TD[-1:])
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Exchange(torch.autograd.Function):
    """Rows (K, ...) to and from every rank, some numbers of them; gradients go back the way the rows came.

    torch's own differentiable ``all_to_all_single`` is another function in each release.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        ctx.counts, ctx.group = (received, sent), group
        output = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(output, rows, list(received), list(sent), group)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        sent, received = ctx.counts
        return _Exchange.apply(grad.contiguous(), sent, received, ctx.group), None, None, None


def take_rows(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Return some rows of (B, L, ...) as (B, K, ...): slices, since an index list would be copied to the device."""
    return torch.cat([x[:, row : row + 1] for row in rows], dim=1) if rows else x[:, :0]


@dataclass(frozen=True)
class ExchangePlan:
    """One rank's part of the exchange, in local row numbers."""

    rows: list[int]
    """The last rows of the local runs that have a successor in the sequence, in the order in which it is received."""

    sent: list[int]
    """The first rows of the local runs that have a predecessor, in the order in which they are sent."""

    receive_counts: tuple[int, ...]
    """How many rows come from each rank, this one included (a copy, without communication)."""

    send_counts: tuple[int, ...]

    ends: list[int]
    """The last row of every local run: its local neighbour is not its successor."""


def runs_of_ranks(length: int, *, context: int, tensor: int, head_tail: bool) -> list[list[range]]:
    """Return the runs of positions that each rank has, in the order of its local rows.

    Args:
        length: of the whole sequence; a multiple of ``context * tensor``, twice that with ``head_tail``.

    Returns:
        For each rank, numbered context-major, at least one run; together every position once.
    """
    assert length % (context * tensor) == 0, f"a sequence of {length} over {context} x {tensor} ranks"
    chunks = 2 * context if head_tail and context > 1 else context
    size = length // chunks
    runs: list[list[range]] = []
    for rank in range(context):
        held = [rank, chunks - 1 - rank] if chunks > context else [rank]
        positions = [position for chunk in held for position in range(chunk * size, (chunk + 1) * size)]
        part = len(positions) // tensor
        runs += [_runs(positions[i * part : (i + 1) * part]) for i in range(tensor)]
    return runs


def _runs(positions: list[int]) -> list[range]:
    starts = [i for i, position in enumerate(positions) if i == 0 or position != positions[i - 1] + 1]
    return [
        range(positions[start], positions[stop - 1] + 1)
        for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True)
    ]


@functools.lru_cache(maxsize=64)
def exchange_plan(length: int, rank: int, *, context: int, tensor: int, head_tail: bool) -> ExchangePlan:
    """Return what ``rank`` sends and receives so that the last row of each of its runs meets its successor."""
    all_runs = runs_of_ranks(length, context=context, tensor=tensor, head_tail=head_tail)
    # By position: who begins or ends a run there, and with which local row.
    begins: dict[int, tuple[int, int]] = {}
    ends: dict[int, tuple[int, int]] = {}
    for owner, runs in enumerate(all_runs):
        row = 0
        for run in runs:
            begins[run.start] = owner, row
            row += len(run)
            ends[run.stop] = owner, row - 1
    # A pair's sender and receiver list their rows in the order of positions, rank by rank.
    seams = sorted(begins.keys() & ends.keys())
    received = sorted((begins[seam][0], seam, ends[seam][1]) for seam in seams if ends[seam][0] == rank)
    sent = sorted((ends[seam][0], seam, begins[seam][1]) for seam in seams if begins[seam][0] == rank)
    ranks = range(len(all_runs))
    return ExchangePlan(
        rows=[row for _, _, row in received],
        sent=[row for _, _, row in sent],
        receive_counts=tuple(sum(source == other for source, _, _ in received) for other in ranks),
        send_counts=tuple(sum(target == other for target, _, _ in sent) for other in ranks),
        ends=sorted(row for owner, row in ends.values() if owner == rank),
    )
