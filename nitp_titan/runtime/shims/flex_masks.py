"""Masks of flex attention on a GPU, with torch versions whose ``create_block_mask`` lacks an option."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch.nn.attention import flex_attention

from nitp_titan.runtime.shims.cpu_device import on_cpu
from nitp_titan.runtime.shims.shim import Shim


def always_separate(create_block_mask: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a ``create_block_mask`` that lacks ``separate_full_blocks``, and does what the option's default asks for."""

    @functools.wraps(create_block_mask)
    def create(*args: Any, separate_full_blocks: bool = True, **options: Any) -> Any:
        if not separate_full_blocks:
            raise NotImplementedError(
                "this torch has no attention masks for TorchTitan's batch-invariant mode (separate_full_blocks = False)"
            )
        return create_block_mask(*args, **options)

    return create


def _patch() -> None:
    from torchtitan.models.common import attention

    attention._compiled_create_block_mask = always_separate(attention._compiled_create_block_mask)


SHIMS = [
    Shim(
        target="torchtitan.models.common.attention._compiled_create_block_mask",
        reason="every decoder asks for separate_full_blocks, which torch 2.11's create_block_mask does not know",
        until="torch 2.13",
        # On a CPU attention has masks of its own.
        applies=lambda: (
            not on_cpu()
            and "separate_full_blocks" not in inspect.signature(flex_attention.create_block_mask).parameters
        ),
        apply=_patch,
    ),
]
