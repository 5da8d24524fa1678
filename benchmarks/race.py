"""The trainers of all variants in one process: built one after the other, then taking turns."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torchtitan.tools import utils

from benchmarks import jobs, kernels, memory
from benchmarks.contestant import Contestant
from benchmarks.measure import DeviceClock, TurnFailed, take_turns_or_drop_out
from benchmarks.summary import Figures


class Race:
    """Variants that are ready to be timed. What fails drops out; the others go on.

    On several ranks a failure ends the race: other ranks may not have failed, and would wait for this one.
    """

    def __init__(self, entries: Sequence[jobs.Entry], data: jobs.Data, *, warmup: int):
        self.contestants: dict[str, Contestant] = {}
        self.figures: dict[str, Figures] = {}
        self.failed: dict[str, str] = {}
        """Name -> why."""
        self._all = entries
        self._alone = os.environ["WORLD_SIZE"] == "1"
        _warm_up()
        for entry in entries:
            say(f"{entry.name}: {entry.variant.meaning}")
            try:
                self.contestants[entry.name], self.figures[entry.name] = _prepare(entry, data, warmup)
            except Exception as error:
                if not self._alone:
                    raise
                self._drop(entry.name, error)

    @property
    def entries(self) -> list[jobs.Entry]:
        """Those that are still in the race."""
        return [entry for entry in self._all if entry.name in self.contestants]

    def run(
        self, *, rounds: int, steps: int, settle: int, after_round: Callable[[dict[str, list[float]]], None]
    ) -> dict[str, list[float]]:
        """Time all, as :func:`benchmarks.measure.take_turns`; if one fails, the others begin anew without it."""

        def drop(name: str, error: BaseException) -> None:
            if not self._alone:
                raise TurnFailed(name) from error
            self._drop(name, error)

        return take_turns_or_drop_out(
            self.contestants,
            drop,
            before=lambda: memory.collect(utils.device_type),
            rounds=rounds,
            steps=steps,
            settle=settle,
            clock=DeviceClock(utils.device_type),
            after_round=after_round,
        )

    def last_losses(self) -> dict[str, float]:
        """Run one more step of each; return the losses."""
        return {name: contestant.logged_loss() for name, contestant in self.contestants.items()}

    def profiles(self, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield where the time of a step goes, of those of these variants that are still in the race."""
        for name in names:
            if contestant := self.contestants.get(name):
                memory.collect(utils.device_type)
                contestant.run(1)
                yield name, kernels.profile_step(lambda contestant=contestant: contestant.run(1), utils.device_type)
                contestant.release()

    def close(self) -> None:
        """End all trainers."""
        for contestant in self.contestants.values():
            contestant.close()

    def _drop(self, name: str, error: BaseException) -> None:
        # As text: the error itself would hold on to what it met.
        self.failed[name] = f"{type(error).__name__}: {error}"
        if contestant := self.contestants.pop(name, None):
            contestant.close()
        say(f"{name} failed: {self.failed[name]}")


def _prepare(entry: jobs.Entry, data: jobs.Data, warmup: int) -> tuple[Contestant, Figures]:
    """Build a trainer and run its first steps, which compile; return it with all that is not timed.

    The peak of memory is that of this variant alone, whatever else is on the device.
    """
    device = utils.device_type
    memory.collect(device)
    before = memory.in_use(device)
    contestant = Contestant(jobs.trainer_config(entry, data))
    try:
        return contestant, _first_steps(contestant, before, warmup)
    except Exception:
        contestant.close()
        raise


def _first_steps(contestant: Contestant, before: int, warmup: int) -> Figures:
    device = utils.device_type
    # The first step makes the optimizer's states, and a CUDA graph is recorded in the second.
    first_loss = contestant.logged_loss()
    contestant.release()
    memory.collect(device)
    kept = memory.in_use(device) - before if device != "cpu" else contestant.state_bytes()
    peak = kept + memory.usage_of(lambda: contestant.run(warmup - 1), device).peak
    contestant.release()
    return Figures(
        parameters=contestant.parameters(),
        state_bytes=contestant.state_bytes(),
        peak_bytes=_largest(peak),
        first_loss=first_loss,
    )


def _warm_up() -> None:
    """Have the workspaces that are allocated once, by the first product: they are no variant's own."""
    if utils.device_type != "cpu":
        x = torch.ones(1024, 1024, dtype=torch.bfloat16, device=utils.device_type)
        (x @ x).sum().item()


def _largest(value: int) -> int:
    """The largest of all ranks' values."""
    largest = torch.tensor(value, dtype=torch.int64, device=utils.device_type)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def peak_flops() -> float | None:
    """Return the peak of dense bf16 products of a GPU by TorchTitan's table; None for a CPU."""
    return None if utils.device_type == "cpu" else utils.get_peak_flops(utils.device_module.get_device_name())


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has made so far in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def say(text: str) -> None:
    """Tell how far the race is; one rank for all."""
    if os.environ["RANK"] == "0":
        print(text, file=sys.stderr, flush=True)
