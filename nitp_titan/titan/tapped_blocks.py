"""A decoder's blocks, which can hand out the residual stream between two of them."""

# Shape suffixes: B = batch, L = sequence, D = model dim

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torchtitan.protocols.module import ModuleDict


class TappedBlocks(ModuleDict):
    """A decoder's blocks, whose iteration can also keep the residual stream between two of them.

    Every TorchTitan decoder runs ``for layer in self.layers.values(): h = layer(h, ...)``. Tapping there leaves its
    forward pass as it is, and stays outside what wraps a block: checkpointing, compilation, FSDP.
    """

    _tap: Tap | None = None

    @contextlib.contextmanager
    def tapped(self, layer: int) -> Iterator[Tap]:
        """While open, the iteration hands the residual stream after ``layer`` blocks to the ``Tap``."""
        self._tap = Tap(layer)
        try:
            yield self._tap
        finally:
            self._tap = None

    def values(self) -> Any:
        if self._tap is None:
            return super().values()
        return [partial(self._tap.run, int(name), block) for name, block in self.items()]


class Tap:
    """Keeps the residual stream after a number of blocks; 0 is the embeddings."""

    def __init__(self, layer: int):
        self.layer = layer
        self.residual_BLD: torch.Tensor | None = None

    def run(self, index: int, block: Callable, h_BLD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the block with this index (from 0)."""
        if index == self.layer:
            self.residual_BLD = h_BLD
        h_BLD = block(h_BLD, *args, **kwargs)
        if index + 1 == self.layer:
            self.residual_BLD = h_BLD
        return h_BLD
