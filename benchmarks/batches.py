"""The same packed batches for every variant: random tokens in documents, with the positions that a real loader gives.

Made once and kept in (pinned) host memory, so that no variant waits for data, and copied to the device by the trainer's
own step as ever. Positions restart at each document: attention masks are built as in training, and their blocks are as
sparse as the documents are short.
"""

# Shape suffixes: B = sequences of a rank's micro-batch, L = tokens of a sequence

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def packed_batch(
    generator: torch.Generator, *, sequences: int, seq_len: int, vocab_size: int, mean_document: int
) -> Batch:
    """Return ``({"input", "positions"}, labels)``, each (B, L) int64.

    Lengths of documents are exponentially distributed, cut at the end of a sequence. As in
    ``nitp_titan.data.streams`` a document's last token, too, has its successor for a label.

    Args:
        mean_document: tokens of a document on average; 0 = a sequence is one document.
    """
    # A document of n inputs has n + 1 tokens: in a row of tokens the label is the next one, of the same document.
    tokens_BL = torch.randint(vocab_size, (sequences, seq_len), generator=generator)
    positions_BL = torch.stack([_positions(generator, seq_len, mean_document) for _ in range(sequences)])
    after_last_BL = torch.randint(vocab_size, (sequences, seq_len), generator=generator)
    next_BL = torch.roll(tokens_BL, -1, dims=1)
    goes_on_BL = torch.roll(positions_BL, -1, dims=1) > 0
    goes_on_BL[:, -1] = False
    labels_BL = torch.where(goes_on_BL, next_BL, after_last_BL)
    return {"input": tokens_BL, "positions": positions_BL}, labels_BL


def _positions(generator: torch.Generator, seq_len: int, mean_document: int) -> torch.Tensor:
    lengths: list[int] = []
    while sum(lengths) < seq_len:
        drawn = seq_len
        if mean_document:
            drawn = 1 + int(torch.empty(1).exponential_(1 / mean_document, generator=generator).item())
        lengths.append(min(drawn, seq_len - sum(lengths)))
    return torch.cat([torch.arange(n) for n in lengths])


class FixedBatches(BaseDataLoader):
    """A few batches, over and over. Ranks that read different data have different ones."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        vocab_size: int
        mean_document: int = 1024
        """Tokens of a document on average; 0 = a sequence is one document."""
        batches: int = 4
        """Different batches."""
        seed: int = 0

    def __init__(self, config: Config, *, dp_rank: int, seq_len: int, local_batch_size: int, **kwargs: Any):
        generator = torch.Generator().manual_seed(config.seed + dp_rank)
        batches = [
            packed_batch(
                generator,
                sequences=local_batch_size,
                seq_len=seq_len,
                vocab_size=config.vocab_size,
                mean_document=config.mean_document,
            )
            for _ in range(config.batches)
        ]
        self._batches = [_pinned(batch) for batch in batches] if torch.cuda.is_available() else batches

    def __iter__(self) -> Iterator[Batch]:
        # The trainer puts what it has copied to the device into the dictionary that it is given.
        return ((dict(inputs), labels) for inputs, labels in itertools.cycle(self._batches))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is kept."""


def _pinned(batch: Batch) -> Batch:
    inputs, labels = batch
    return {name: tensor.pin_memory() for name, tensor in inputs.items()}, labels.pin_memory()


class NoTokenizer(BaseTokenizer):
    """In a tokenizer's place: the batches are tokens already, and a benchmark needs no files."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        vocab_size: int

    def __init__(self, config: Config, **kwargs: Any):
        super().__init__()
        self._vocab_size = config.vocab_size

    def get_vocab_size(self) -> int:
        return self._vocab_size

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *args: Any, **kwargs: Any) -> str:
        raise NotImplementedError
