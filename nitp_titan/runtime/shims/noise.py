"""Messages of imports that a user of this library can do nothing about."""

from __future__ import annotations

import logging

from nitp_titan.runtime.shims.cpu_device import on_cpu
from nitp_titan.runtime.shims.shim import Shim

SHIMS = [
    Shim(
        target="the level of the logger torchao",
        reason="torchao warns that its CUDA kernels cannot be loaded, on a machine that has no use for them",
        until="torchao is quiet without a GPU",
        applies=on_cpu,
        apply=lambda: logging.getLogger("torchao").setLevel(logging.ERROR),
    ),
    Shim(
        target="the level of the logger torch.utils._pytree",
        reason="torchao 0.18 registers enums in a way that torch 2.13 warns of, at every import",
        until="torchao 0.19",
        applies=lambda: True,
        apply=lambda: logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR),
    ),
]
