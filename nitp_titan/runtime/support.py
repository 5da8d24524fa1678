"""What works with which torch, on which device: the one table of limits. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

Version = tuple[int, int]


Verdict = tuple[bool, str]
"""Whether it works, and the reason why not, or what to know where it does."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the verdicts depend on: the kind of device that a run would train on."""

    type: str
    """ "cuda" (NVIDIA), "rocm" (AMD, which torch calls "cuda" too) or "cpu" """
    name: str
    count: int = 1
    capability: Version | None = None
    """CUDA compute capability, the smallest of all devices."""
    backends: tuple[str, ...] = ("gloo",)
    """torch.distributed backends of this torch build."""
    compiler: str | None = None
    """The C/C++ compiler that torch.compile would call."""
    details: tuple[tuple[str, str], ...] = ()
    """Further lines of the report: (label, text)."""

    @property
    def is_gpu(self) -> bool:
        return self.type != "cpu"


def _training(torch: Version, device: Device) -> Verdict:
    backend = "nccl" if device.is_gpu else "gloo"
    if backend not in device.backends:
        return False, f"this torch is built without {backend}"
    return True, f"{'GPU' if device.is_gpu else 'CPU'}, {backend} between ranks"


def _compile(torch: Version, device: Device) -> Verdict:
    if device.compiler is None:
        language, key = ("C", "CC") if device.is_gpu else ("C++", "CXX")
        return False, f"no {language} compiler found: install gcc, or set {key}"
    return True, f"with {device.compiler}"


def _float8(torch: Version, device: Device) -> Verdict:
    if device.type == "cpu":
        return False, "needs a GPU of compute capability 8.9; emulated here with float8.emulate, slower"
    if device.type == "rocm":
        return False, "not tried on AMD GPUs"
    if device.capability is None or device.capability < (8, 9):
        needs = f"needs compute capability 8.9, this is {dotted(device.capability)}"
        return False, f"{needs}; emulated here with float8.emulate, slower"
    return True, "" if device.capability[0] in (9, 10) else "linear layers; experts need compute capability 9 or 10"


def _since_2_13(torch: Version, device: Device) -> Verdict:
    if torch < (2, 13):
        return False, f"needs torch >= 2.13, this is {dotted(torch)}"
    return True, ""


def _cuda_graphs(torch: Version, device: Device) -> Verdict:
    if device.type != "cuda":
        return False, "needs an NVIDIA GPU"
    works, reason = _since_2_13(torch, device)
    return works, reason or "dense models; upstream refuses them for expert and pipeline parallelism"


def _expert_parallel(torch: Version, device: Device) -> Verdict:
    if not device.is_gpu and torch >= (2, 15):
        return False, f"gloo's all-to-all fails on torch {dotted(torch)}; torch 2.13 works on a CPU"
    return _since_2_13(torch, device)


def _context_parallel(torch: Version, device: Device) -> Verdict:
    return True, "" if device.is_gpu else "with a dense mask over all keys"


def _upstream_entry(torch: Version, device: Device) -> Verdict:
    needs = []
    if torch < (2, 14):
        needs.append(f"torch >= 2.14 (this is {dotted(torch)})")
    if not device.is_gpu:
        needs.append("a GPU")
    if needs:
        return False, f"needs {' and '.join(needs)}; use python -m nitp_titan.train"
    return True, ""


def _flex_attention(torch: Version, device: Device) -> Verdict:
    if not device.is_gpu:
        return False, "has no backward on a CPU; SDPA with the document mask takes its place"
    return True, ""


FEATURES: tuple[tuple[str, Callable[[Version, Device], Verdict]], ...] = (
    ("training", _training),
    ("torch.compile", _compile),
    ("flex attention", _flex_attention),
    ("float8", _float8),
    ("CUDA graphs", _cuda_graphs),
    ("upstream's chunked cross-entropy", _since_2_13),
    ("expert parallelism", _expert_parallel),
    ("pipeline parallelism", _since_2_13),
    ("context parallelism", _context_parallel),
    ("python -m torchtitan.train", _upstream_entry),
)


class Row(NamedTuple):
    name: str
    works: bool
    reason: str


def what_works(torch: Version, device: Device) -> list[Row]:
    return [Row(name, *verdict(torch, device)) for name, verdict in FEATURES]


def dotted(version: Version | None) -> str:
    """Return a version as one writes it."""
    return "unknown" if version is None else ".".join(map(str, version))
