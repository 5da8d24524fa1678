"""Whether a number is far above the last ones of its kind, told on the device."""

# Shape suffix: N = values of a window

from __future__ import annotations

import torch
from torch import Tensor


class Window:
    """The last values of a series, on the device, of which the host never has to know."""

    def __init__(self, size: int, sigma: float, device: torch.device):
        """Keep ``size`` values; a spike is more than ``sigma`` standard deviations above their mean."""
        self._size, self._sigma = size, sigma
        self._values_N = torch.zeros(size, dtype=torch.float64, device=device)
        self._places_N = torch.arange(size, device=device)
        self._added = torch.zeros((), dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Forget all values."""
        self._added.zero_()

    def take(self, value: Tensor) -> Tensor:
        """Return whether a value (0-d) is a spike, 0-d bool, and keep it, unless it is not finite.

        A spike is kept too, as OLMo-core does: a level that has changed for good is not a spike for ever.
        """
        value = value.double()
        spike = self._is_spike(value)
        finite = value.isfinite()
        self._values_N = torch.where((self._places_N == self._added % self._size) & finite, value, self._values_N)
        self._added = self._added + finite
        return spike

    def _is_spike(self, value: Tensor) -> Tensor:
        number = self._added.clamp(max=self._size)
        held_N = self._places_N < number
        mean = torch.where(held_N, self._values_N, 0).sum() / number.clamp(min=1)
        squares = torch.where(held_N, self._values_N - mean, 0).square().sum()
        deviation = (squares / (number - 1).clamp(min=1)).sqrt()
        return (number >= self._size // 2) & (value - mean > self._sigma * deviation)
