"""The tiles, warps and stages of flex attention that ``benchmarks.attention`` compares. Free of torch."""

from __future__ import annotations

from typing import Literal

from nitp_titan.models.flex_options import default_options

Direction = Literal["forward", "backward"]
TORCHS = "torch's"
"""The candidate that sets nothing."""
NAMES: dict[Direction, tuple[str, ...]] = {
    "forward": ("fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_warps", "fwd_num_stages"),
    "backward": ("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2", "bwd_num_warps", "bwd_num_stages"),
}
# Those that fit a head dim of 64 and those that fit one of 160; what does not fit into shared memory is left out.
_CANDIDATES: dict[Direction, tuple[tuple[int, ...], ...]] = {
    "forward": (
        (128, 128, 8, 3),
        (128, 128, 8, 2),
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (64, 128, 4, 3),
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (128, 32, 8, 3),
        (64, 32, 4, 3),
    ),
    "backward": (
        (64, 128, 128, 64, 8, 2),
        (64, 128, 128, 64, 4, 2),
        (64, 64, 64, 64, 4, 3),
        (64, 64, 64, 64, 4, 2),
        (64, 64, 64, 64, 8, 2),
        (32, 128, 128, 32, 8, 3),
        (32, 128, 128, 32, 4, 3),
        (32, 64, 64, 32, 4, 3),
        (32, 64, 64, 32, 4, 2),
        (32, 64, 64, 32, 8, 2),
        (128, 128, 128, 128, 8, 2),
    ),
}


def candidates(direction: Direction, head_dim: int) -> dict[str, dict[str, int]]:
    """Return name -> options of one direction: torch's choice, ours where a head dim has one, and others."""
    names = NAMES[direction]
    found: dict[str, dict[str, int]] = {TORCHS: {}}
    ours = default_options(head_dim)
    rows = [tuple(ours[name] for name in names)] if ours else []
    rows += [row for row in _CANDIDATES[direction] if row not in rows]
    return found | {" ".join(map(str, row)): dict(zip(names, row, strict=True)) for row in rows}
