"""What lets one TorchTitan release run on a CPU and on several torch versions.

Nothing outside this package knows that devices and versions differ, and importing it changes nothing:
:func:`prepare` applies the shims, once, before TorchTitan's other modules are imported.
"""

from __future__ import annotations

import sys

from nitp_titan.runtime.shim import Shim


def shims() -> list[Shim]:
    """Every shim there is, in the order in which they are applied."""
    from nitp_titan.runtime import cpu_attention, cpu_device, gloo, torch_gaps

    return [*torch_gaps.SHIMS, *cpu_device.SHIMS, *gloo.SHIMS, *cpu_attention.SHIMS]


_applied: list[Shim] = []


def prepare() -> list[Shim]:
    """Make TorchTitan ready for this machine; call it before any other TorchTitan import.

    Returns:
        The shims that this machine needed. Later calls return the same and do nothing.

    Raises:
        RuntimeError: TorchTitan's trainer was imported first and took its device from there.
    """
    if not _applied and on_cpu() and "torchtitan.components.metrics" in sys.modules:
        raise RuntimeError(
            "nitp_titan.runtime.prepare() must run before torchtitan's trainer is imported: "
            "it reads the device once, at import"
        )
    if not _applied:
        _applied.extend(shim for shim in shims() if shim.applies())
        for shim in _applied:
            shim.apply()
    return list(_applied)


def on_cpu() -> bool:
    """Whether training runs on the CPU: there is no accelerator that TorchTitan trains on."""
    from nitp_titan.runtime.cpu_device import on_cpu as answer

    return answer()
