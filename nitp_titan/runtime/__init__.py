"""What lets one TorchTitan release run on a CPU and on several torch versions.

Nothing outside this package knows that devices and versions differ, and importing it changes nothing:
:func:`prepare` applies the shims, once.
"""

from __future__ import annotations

import functools

from nitp_titan.runtime.shims.shim import Shim


def shims() -> list[Shim]:
    """Every shim there is, in the order in which they are applied."""
    from nitp_titan.runtime.shims import (
        async_collectives,
        cpu_attention,
        cpu_device,
        empty_ranks,
        flex_masks,
        gloo,
        noise,
        pipelining,
        torch_gaps,
    )

    modules = (
        noise,
        torch_gaps,
        cpu_device,
        gloo,
        async_collectives,
        cpu_attention,
        flex_masks,
        pipelining,
        empty_ranks,
    )
    return [shim for module in modules for shim in module.SHIMS]


@functools.cache
def prepare() -> tuple[Shim, ...]:
    """Make TorchTitan ready for this machine; call it before a TorchTitan trainer or model is built.

    Returns:
        The shims that this machine needed. Later calls return the same and do nothing.
    """
    needed = tuple(shim for shim in shims() if shim.applies())
    for shim in needed:
        shim.apply()
    return needed
