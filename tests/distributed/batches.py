"""Batches whose documents lie across every boundary at which a parallelism may cut a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader

SEQ_LEN = 64
ROWS = 8
"""Sequences of a global batch."""

CUT = 4
"""Every boundary between shards is a multiple of it: 64 tokens on up to 16 pieces."""

# Lengths of the documents in each row.
_DOCUMENTS = (
    (64,),  # over every boundary
    (2, *[4] * 15, 2),  # over every boundary, none longer than a piece
    tuple([CUT] * 16),  # ending at every boundary
    (7, 1, 16, 40),
    (1,) * 8 + (56,),
    (33, 31),
    (15, 17, 17, 15),
    (3, 60, 1),
)


def global_batch(step: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, positions and labels (ROWS, SEQ_LEN) of a step.

    Some labels are ignored: a run of them, all of a row's second half, and the last before some boundaries.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(vocab_size, (ROWS, SEQ_LEN + 1), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in _DOCUMENTS])
    labels = tokens[:, 1:].clone()
    labels[3, 10:20] = -100
    labels[5, SEQ_LEN // 2 :] = -100
    labels[6, CUT * 4 - 1 :: CUT * 4] = -100
    labels[(step + 1) % ROWS, step] = -100
    return tokens[:, :-1].contiguous(), positions, labels


class StraddlingBatches(BaseDataLoader):
    """The rows of :func:`global_batch`, shared out to data-parallel ranks and micro-batches in order."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        vocab_size: int

        infinite: bool = True
        """Set by TorchTitan's validator; there is always another batch."""

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **kwargs: Any):
        self.vocab_size = config.vocab_size
        rows = ROWS // dp_world_size
        first = range(dp_rank * rows, (dp_rank + 1) * rows, local_batch_size)
        self.parts = [slice(start, start + local_batch_size) for start in first]

    def rows_of(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens, positions and labels (ROWS, SEQ_LEN) of a step."""
        return global_batch(step, self.vocab_size)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        step = 0
        while True:
            tokens, positions, labels = self.rows_of(step)
            for part in self.parts:
                yield {"input": tokens[part], "positions": positions[part]}, labels[part]
            step += 1

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class FewLabels(StraddlingBatches):
    """The same, but that almost all labels of the first step are ignored, and all of the second and the fourth.

    Those that count are in the first row and before the first of four parts of a sequence ends: of one data-parallel
    rank, of one micro-batch, and with either balancer of one of two context ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(StraddlingBatches.Config):
        pass

    def rows_of(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, positions, labels = super().rows_of(step)
        counts = torch.zeros_like(labels, dtype=torch.bool)
        counts[0, : SEQ_LEN // 4] = step == 0
        return tokens, positions, labels if step in LABELLED else labels.where(counts, -100)


LABELLED = (2, 4, 5)
"""Steps, counted from 0, in which :class:`FewLabels` has the labels of :class:`StraddlingBatches`."""
