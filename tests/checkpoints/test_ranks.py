"""nitp_titan.checkpoints.ranks: ranks come to the same, whatever the first one meets while the others wait."""

from __future__ import annotations

import errno
from typing import Any

import torch.distributed as dist

from nitp_titan.checkpoints.ranks import failure_of_first_rank, is_first_rank, of_every_rank, of_first_rank
from nitp_titan.runs.errors import FolderInUseError
from tests.helpers.ranks import run_on_ranks


class Stubborn(Exception):
    """An exception that does not travel: it wants more than its message."""

    def __init__(self, one: int, two: int):
        super().__init__(f"{one} and {two}")


def _raising(error: Exception) -> None:
    raise error


def on_a_rank() -> dict[str, Any]:
    rank = dist.get_rank()
    done: list[int] = []
    errors = {
        "none": failure_of_first_rank(lambda: done.append(rank)),
        "disk": failure_of_first_rank(lambda: _raising(OSError(errno.ENOSPC, "No space left", "/x"))),
        "ours": failure_of_first_rank(lambda: _raising(FolderInUseError("in use"))),
        "stubborn": failure_of_first_rank(lambda: _raising(Stubborn(1, 2))),
    }
    told = {name: (type(error).__name__, str(error)) for name, error in errors.items()}
    told["filename"] = getattr(errors["disk"], "filename", None)
    return {"first": of_first_rank(rank), "every": of_every_rank(rank), "done": done, "told": told}


def test_all_ranks_come_to_the_same():
    first, second = run_on_ranks(2, on_a_rank)
    assert (first["done"], second["done"]) == ([0], [])
    assert first["first"] == second["first"] == 0
    assert first["every"] == second["every"] == [0, 1]
    assert first["told"] == second["told"]
    assert first["told"]["none"] == ("NoneType", "None")
    assert first["told"]["disk"][0] == "OSError"
    assert first["told"]["filename"] == "/x"
    assert first["told"]["ours"] == ("FolderInUseError", "in use")
    assert first["told"]["stubborn"] == ("RuntimeError", "Stubborn: 1 and 2")


def test_a_process_alone_decides_for_itself():
    assert is_first_rank()
    assert of_first_rank("x") == "x"
    assert of_every_rank("x") == ["x"]
    error = KeyError("y")
    assert failure_of_first_rank(lambda: _raising(error)) is error
