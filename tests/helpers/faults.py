"""Numbers that are not finite, put into a training run on purpose."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.optimizer.utils import get_flat_optim_state_dict

from nitp_titan.nitp.dtensors import local

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Poison:
    """What becomes not finite in a run, and when."""

    steps: Collection[int]
    kind: str
    """"loss" (after the backward pass), "gradient" (one element of one) or "activation" (a block's whole output)."""

    value: float = NAN
    rank: int | None = None
    """The one rank on which it does; None is every one."""

    micro_batch: int = 0
    """The call of forward_backward_step in its step."""


def poison(trainer: Any, fault: Poison) -> None:
    """Have a trainer's passes give a loss, one element of a gradient, or a block's output, that is not as it should be.

    Under our own seams: what is changed is what TorchTitan's passes do.
    """
    name = "pp_forward_backward_step" if trainer.parallel_dims.pp_enabled else "fwd_bwd_fn"
    original, calls = getattr(trainer, name), dict.fromkeys(fault.steps, 0)
    here = fault.rank in (None, torch.distributed.get_rank())
    acting = False

    def forward_backward(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal acting
        acting = here and calls.get(trainer.step) == fault.micro_batch
        if trainer.step in calls:
            calls[trainer.step] += 1
        loss = original(*args, **kwargs)
        if not acting:
            return loss
        acting = False
        if fault.kind == "loss":
            return loss * fault.value
        if fault.kind == "gradient":
            grads = (local(p.grad) for part in trainer.model_parts for p in part.parameters() if p.grad is not None)
            with torch.no_grad():
                next(g for g in grads if g.numel()).view(-1)[0] = fault.value
        return loss

    def change_output(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * fault.value if acting else output

    if fault.kind == "activation":
        next(iter(trainer.model_parts[-1].layers.values())).register_forward_hook(change_output)
    setattr(trainer, name, forward_backward)


def each_call(trainer: Any, name: str, call: Callable[[], Any]) -> None:
    """Have a trainer's method call ``call`` after itself."""
    original = getattr(trainer, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        call()
        return result

    setattr(trainer, name, both)


def whole_state(trainer: Any) -> dict[str, torch.Tensor]:
    """Return copies of all that a step may change on this rank: weights, buffers, moments and step counts."""
    return {name: local(value).detach().clone() for name, value in tensors_of(trainer)}


def tensors_of(trainer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield them, with names, as they are in memory."""
    for number, part in enumerate(trainer.model_parts):
        for name, value in [*part.named_parameters(), *part.named_buffers()]:
            yield f"{number}.{name}", value
    for number, optimizer in enumerate(trainer.optimizers):
        for name, value in get_flat_optim_state_dict(optimizer).items():
            if isinstance(value, torch.Tensor) and name.startswith("state."):
                yield f"{number}.{name}", value


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not the same, bit for bit."""
    names = found.keys() | expected.keys()
    return sorted(n for n in names if n not in found or n not in expected or not torch.equal(found[n], expected[n]))
