"""The sizes of flex attention's kernels on a GPU: what ``[model.flex_kernel_options]`` sets, and what a head dim gets.

Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True, frozen=True, slots=True)
class FlexKernelOptions:
    """Tiles, warps and stages of flex attention's Triton kernels, by torch's names (``flex_attention``'s
    ``kernel_options``). What is not set is torch's choice for the head dim and the GPU."""

    fwd_BLOCK_M: int
    """Forward: queries of a tile."""

    fwd_BLOCK_N: int
    """Forward: keys of a tile."""

    fwd_num_warps: int
    """Forward: warps of a block."""

    fwd_num_stages: int
    """Forward: tiles that are loaded ahead, and one."""

    bwd_BLOCK_M1: int
    """Backward, gradients of keys and values: queries of a tile."""

    bwd_BLOCK_N1: int
    """Backward, gradients of keys and values: keys of a tile; a multiple of bwd_BLOCK_M1."""

    bwd_BLOCK_M2: int
    """Backward, gradients of queries: queries of a tile; a multiple of bwd_BLOCK_N2."""

    bwd_BLOCK_N2: int
    """Backward, gradients of queries: keys of a tile."""

    bwd_num_warps: int
    """Backward: warps of a block."""

    bwd_num_stages: int
    """Backward: tiles that are loaded ahead, and one."""


MASK_BLOCK = 128
"""Tokens of a block of the mask, of which every tile is a part: torch's default."""

# 64 is by measurement on an H100 with documents of 1,024 tokens (benchmarks/results/h100): alone, the kernels take 0.62
# (forward) and 0.83 (backward) times as long as with torch's own choice, and the 0.5B model's step is 1.5 % shorter.
# 160 is padded to 256 in a kernel. With torch's own choice the backward kernel spills 1,696 bytes a thread on an H100,
# and the forward kernel takes 99 % of its shared memory; with these 152 and 0 bytes, 56 and 71 %.
_BY_HEAD_DIM: dict[int, dict[str, int]] = {
    64: {
        "fwd_BLOCK_M": 128,
        "fwd_BLOCK_N": 64,
        "fwd_num_warps": 4,
        "fwd_num_stages": 3,
        "bwd_BLOCK_M1": 64,
        "bwd_BLOCK_N1": 64,
        "bwd_BLOCK_M2": 64,
        "bwd_BLOCK_N2": 64,
        "bwd_num_warps": 4,
        "bwd_num_stages": 2,
    },
    160: {
        "fwd_BLOCK_M": 128,
        "fwd_BLOCK_N": 32,
        "fwd_num_warps": 8,
        "fwd_num_stages": 3,
        "bwd_BLOCK_M1": 32,
        "bwd_BLOCK_N1": 64,
        "bwd_BLOCK_M2": 64,
        "bwd_BLOCK_N2": 32,
        "bwd_num_warps": 8,
        "bwd_num_stages": 2,
    },
}


def default_options(head_dim: int) -> dict[str, int]:
    """Return the options of a model of ours with this head dim; none where torch's choice is as good."""
    return dict(_BY_HEAD_DIM.get(head_dim, {}))


def problems(options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for every option that a kernel cannot have."""
    wrong = set()
    for name, value in options.items():
        expected = _expected(name)
        if value not in expected:
            wrong.add(name)
            yield name, f"found {value}, expected one of {', '.join(map(str, expected))}"
    for outer, inner in (("bwd_BLOCK_N1", "bwd_BLOCK_M1"), ("bwd_BLOCK_M2", "bwd_BLOCK_N2")):
        pair = options.get(outer), options.get(inner)
        if None not in pair and not {outer, inner} & wrong and pair[0] % pair[1]:
            yield outer, f"found {pair[0]}, expected a multiple of {inner}, {pair[1]}"


def _expected(name: str) -> tuple[int, ...]:
    if "BLOCK" in name:
        return (16, 32, 64, MASK_BLOCK)
    return (1, 2, 4, 8) if name.endswith("warps") else (1, 2, 3, 4, 5)
