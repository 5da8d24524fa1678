"""The random state of every rank in a checkpoint: of Python, of NumPy and of torch, on the CPU and on the device."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import distributed as dist
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.distributed import ParallelDims

from nitp_titan.job.errors import JobError, Problem

RANDOM_STATE = "random_state"
"""Its name among the states of a checkpoint."""

LAYOUT = "layout"
"""What it was saved on, as text: the states of another layout are those of other ranks' work."""

ANEW = "they begin anew, torch's from debug.seed"
"""What becomes of generators that are not restored."""

_LAYOUT_BYTES = 128
_DEGREES = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")


class _Generator(NamedTuple):
    get: Callable[[], torch.Tensor]
    """Returns a copy, so that what is saved in the background is the state of the moment of the save."""

    set: Callable[[torch.Tensor], None]


class RandomState(Stateful):
    """The generators of this process, as tensors and nothing else: no object is unpickled to restore them.

    Each rank saves under names of its own, ``rank_3.torch_cpu`` say, and reads only those. They are restored on the
    layout on which they were saved. On any other they are left: the generators stay as they are at the start of a run,
    where TorchTitan seeds torch's with ``debug.seed``. ``outcome`` tells in words what became of those that were read.
    """

    def __init__(self, layout: str, device: torch.device):
        """Hold the generators that a rank of ``layout`` uses on ``device``."""
        self.outcome = "not restored"
        self._layout = layout
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._generators = {
            "python": _Generator(_python_state, _set_python_state),
            "numpy": _Generator(_numpy_state, _set_numpy_state),
            "torch_cpu": _Generator(torch.get_rng_state, torch.set_rng_state),
        }
        of_device = torch.get_device_module(device)
        if device.type != "cpu" and hasattr(of_device, "get_rng_state"):
            self._generators[f"torch_{device.type}"] = _Generator(of_device.get_rng_state, of_device.set_rng_state)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the states of this moment, which later draws do not change."""
        states = {self._key(name): generator.get() for name, generator in self._generators.items()}
        return {LAYOUT: _as_tensor(self._layout), **states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what fits; what a checkpoint lacks is missing here.

        Raises:
            JobError: a state is none of its generator.
        """
        if LAYOUT not in state_dict:
            self.outcome = f"not in this checkpoint, which is older; {ANEW}"
        elif (saved := _as_text(state_dict[LAYOUT])) != self._layout:
            self.outcome = f'saved on "{saved}", which means nothing on "{self._layout}"; {ANEW}'
        elif missing := [name for name in self._generators if self._key(name) not in state_dict]:
            self.outcome = f"of {', '.join(missing)} not in this checkpoint; {ANEW}"
        else:
            for name, generator in self._generators.items():
                try:
                    generator.set(state_dict[self._key(name)])
                except (ValueError, RuntimeError, OverflowError) as error:
                    afresh = f'checkpoint.exclude_from_loading = ["{RANDOM_STATE}"] leaves it'
                    message = f"{RANDOM_STATE}.{self._key(name)} is no state of that generator ({error})"
                    raise JobError([Problem("checkpoint", "", message, afresh)]) from error
            self.outcome = f"restored on every rank ({', '.join(self._generators)})"

    def _key(self, name: str) -> str:
        return f"rank_{self._rank}.{name}"


def layout_of(dims: ParallelDims, device: torch.device) -> str:
    """Return what decides which rank draws for what: the ranks, their degrees and the kind of device."""
    degrees = [f"{name}={value}" for name in _DEGREES if (value := getattr(dims, name)) > 1]
    return " ".join([f"{dims.world_size} {device.type}", *degrees])


def _as_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()[:_LAYOUT_BYTES].ljust(_LAYOUT_BYTES)), dtype=torch.uint8)


def _as_text(tensor: torch.Tensor) -> str:
    return bytes(tensor.tolist()).decode(errors="replace").strip()


def _bits(value: float | None) -> tuple[int, int]:
    """Return whether there is a number, and its 64 bits."""
    return (0, 0) if value is None else (1, struct.unpack("<q", struct.pack("<d", value))[0])


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def _python_state() -> torch.Tensor:
    _, words, next_normal = random.getstate()
    return torch.tensor([*words, *_bits(next_normal)], dtype=torch.int64)


def _set_python_state(state: torch.Tensor) -> None:
    *words, has_normal, bits = state.tolist()
    random.setstate((random.getstate()[0], tuple(words), _number(bits) if has_normal else None))


def _numpy_state() -> torch.Tensor:
    _, words, position, has_normal, next_normal = np.random.get_state()
    return torch.tensor([*words.tolist(), position, *_bits(next_normal if has_normal else None)], dtype=torch.int64)


def _set_numpy_state(state: torch.Tensor) -> None:
    *words, position, has_normal, bits = state.tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), position, has_normal, _number(bits)))
