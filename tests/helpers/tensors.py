"""Small tensors to test with: numbers and masks of a seed."""

import torch


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def some(*shape, seed=7):
    """A mask with True and False in every row of ordinary size."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
