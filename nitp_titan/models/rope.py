"""Rotary positions of interleaved pairs in real arithmetic, which torch.compile fuses."""

# Shape suffixes: B = batch, L = sequence, N = heads, H = head dim, P = pairs of a head (H / 2), M = cached positions

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.models.common import ComplexRoPE
from torchtitan.models.common.rope import CosSinRoPE


class InterleavedRoPE(ComplexRoPE):
    """TorchTitan's ``ComplexRoPE`` without complex numbers: features 2i and 2i + 1 are turned by the same angle.

    Inductor has no code for complex numbers: of ``ComplexRoPE`` its casts, gather and products stay kernels of their
    own, in the forward pass, in recomputation and in the backward pass, each over queries and keys in fp32.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComplexRoPE.Config):
        pass

    # The cache has the head's width, as CosSinRoPE's has: its rows are found and broadcast in the same way.
    _reshape_cache = CosSinRoPE._reshape_cache

    def _precompute_cache(self) -> torch.Tensor:
        """Return ``ComplexRoPE``'s cache as (M, H) fp32: cosine and sine of each pair, side by side."""
        return torch.view_as_real(super()._precompute_cache()).flatten(1)

    @staticmethod
    def apply_rotary_emb(
        query: torch.Tensor, key: torch.Tensor, rope_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn the pairs of queries and keys (B, L, N, H) by the cache's rows (1 or B, L, 1, H); in fp32."""
        cache_BL1P2 = rope_cache.unflatten(-1, (-1, 2))
        cos_BL1P, sin_BL1P = cache_BL1P2[..., 0], cache_BL1P2[..., 1]

        def turned(x_BLNH: torch.Tensor) -> torch.Tensor:
            x_BLNP2 = x_BLNH.float().unflatten(-1, (-1, 2))
            a_BLNP, b_BLNP = x_BLNP2[..., 0], x_BLNP2[..., 1]
            pairs = a_BLNP * cos_BL1P - b_BLNP * sin_BL1P, a_BLNP * sin_BL1P + b_BLNP * cos_BL1P
            return torch.stack(pairs, dim=-1).flatten(-2).type_as(x_BLNH)

        return turned(query), turned(key)
