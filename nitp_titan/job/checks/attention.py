"""Attention kernels that are packages of their own: which of them a GPU needs, and whether they are there."""

from __future__ import annotations

from collections.abc import Iterator

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem
from nitp_titan.runtime import machine

FA3, FA4 = "flash_attn_interface", "flash_attn.cute.interface"
_PACKAGES = {FA3: "FlashAttention 3, built from its source", FA4: "pip install flash-attn-4"}


def check_attention(draft: Draft) -> Iterator[Problem]:
    """The kernels that attention is to run on can be imported where the job runs."""
    capability, backend = machine.gpu_capability(), draft.get("model", "attn_backend")
    # Whether somebody else's model takes a backend is not known.
    if capability is None or "." in draft.get("model", "module"):
        return
    if message := missing_kernel(backend, capability):
        yield draft.problem("model", "attn_backend", message, 'attn_backend = "flex" needs no package')


def missing_kernel(backend: str, capability: tuple[int, int]) -> str:
    """Return why a GPU cannot run a backend (of ``[model] attn_backend``); empty where it can.

    As TorchTitan chooses: its varlen attention takes FlashAttention 3 on Hopper and 4 on Blackwell, torch's own kernel
    on older GPUs; torch's flex attention in FlashAttention 4 exists for both.
    """
    needed = ""
    if backend == "flex_flash":
        if capability < machine.HOPPER:
            return 'found "flex_flash", which needs a Hopper or Blackwell GPU'
        needed = FA4
    elif backend == "varlen" and capability >= machine.HOPPER:
        needed = FA4 if capability >= machine.BLACKWELL else FA3
    if not needed or machine.has_module(needed):
        return ""
    name = "Blackwell" if capability >= machine.BLACKWELL else "Hopper"
    return f'found "{backend}", which on a {name} GPU needs {needed} ({_PACKAGES[needed]}), and it is not installed'
