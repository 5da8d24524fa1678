"""Launch a job's ranks on this machine, and end with their exit code: for ``run_train.sh`` and ``nitp-titan train``.

One rank is this very process, replaced. Several are torchrun's, whose agent runs here in a thread: there it takes no
signals, so that they are ours. The first one is passed on to the ranks, which save and end by themselves, however long
that takes; a second one kills them. torchrun would kill them after its timeout, and end with 1 whatever they say.

The environment says what ``run_train.sh`` documents: NGPU, LOG_RANK, NNODES, RDZV_ENDPOINT, RDZV_ID, NODE_RANK.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from nitp_titan.cli import check
from nitp_titan.job import JobError, load_job
from nitp_titan.runs.status import STATUS_FILE, is_alive, now, read_status, replace
from nitp_titan.training.signals import NAMES, SAME_S, before_the_first_step

WORKER = "nitp_titan.train"
FAILED = 1


class BadLaunchError(ValueError):
    """The environment contradicts itself; the message is one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Which ranks run here, and where they meet those of other nodes."""

    ranks_here: int = 1
    nodes: int = 1
    shown: str = "0"
    """Local ranks whose console is shown, comma-separated."""
    rendezvous: tuple[str, ...] = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")

    @property
    def ranks(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.ranks_here

    @classmethod
    def read(cls, environment: Mapping[str, str], ranks_here: int | None = None) -> Launch:
        """Read the environment; ``ranks_here`` goes before its NGPU.

        Raises:
            BadLaunchError: it contradicts itself.
        """
        given = {name: value for name, value in environment.items() if value}
        for name in ("NGPU", "NNODES"):
            if not re.fullmatch("[1-9][0-9]*", found := given.get(name, "1")):
                raise BadLaunchError(f'{name}: found "{found}", expected a whole number of at least 1')
        ranks_here = ranks_here or int(given.get("NGPU", "1"))
        shown = given.get("LOG_RANK", "0")
        endpoint, node_rank = given.get("RDZV_ENDPOINT", ""), given.get("NODE_RANK")
        if "NNODES" not in given and (endpoint or node_rank):
            raise BadLaunchError(
                "RDZV_ENDPOINT or NODE_RANK is set without NNODES; set NNODES to the number of nodes, or unset them"
            )
        nodes = int(given.get("NNODES", "1"))
        if nodes == 1:
            return cls(ranks_here=ranks_here, shown=shown)
        if not endpoint:
            raise BadLaunchError(f"NNODES={nodes} needs RDZV_ENDPOINT=HOST[:PORT], the same on every node")
        endpoint = endpoint if ":" in endpoint else f"{endpoint}:29500"
        meeting = ["--rdzv-endpoint", endpoint, "--rdzv-id", given.get("RDZV_ID", "nitp_titan")]
        backend = "c10d"
        if node_rank is not None:
            if not node_rank.isdecimal() or int(node_rank) >= nodes:
                expected = f"expected 0 to {nodes - 1} for NNODES={nodes}"
                raise BadLaunchError(f'NODE_RANK: found "{node_rank}", {expected}')
            # The c10d rendezvous gives out the ranks itself.
            backend = "static"
            meeting += ["--node-rank", node_rank]
        return cls(ranks_here=ranks_here, nodes=nodes, shown=shown, rendezvous=("--rdzv-backend", backend, *meeting))

    def torchrun(self, file: str, options: Sequence[str]) -> list[str]:
        """Return torchrun's words."""
        return [
            *("--nnodes", str(self.nodes), "--nproc-per-node", str(self.ranks_here), *self.rendezvous),
            *("--local-ranks-filter", self.shown, "--role", "rank", "--tee", "3"),
            *("-m", WORKER, "--job.config_file", file, *options),
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """``run_train.sh``: FILE, then ``--table.key value ...``."""
    file, *options = sys.argv[1:] if arguments is None else arguments
    return launch(file, options, entry="run_train.sh")


def launch(file: str, options: list[str], *, entry: str, ranks_here: int | None = None) -> int:
    """Check a job, train it, and return the exit code of its ranks (one rank takes this process's place).

    Args:
        options: ``--table.key value`` words.
        entry: what the user has called, for messages.
        ranks_here: ranks on this machine; None for the environment's.
    """
    try:
        plan = Launch.read(os.environ, ranks_here)
    except BadLaunchError as error:
        print(f"{entry}: {error}", file=sys.stderr)
        return 2
    # A bad job is told here, in a second, before any process is launched: on every node, since the others would wait
    # for one that is missing.
    try:
        looked_at = argparse.Namespace(
            file=file, ngpu=plan.ranks, device="here", keys=None, strict=False, dry_run=False
        )
        if code := check.run(looked_at, options):
            return code
    except JobError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    sys.stdout.flush()
    if plan.ranks == 1:
        os.execv(sys.executable, [sys.executable, "-m", WORKER, "--job.config_file", file, *options])
    code, reason = Agent(plan.torchrun(file, options)).run()
    if code:
        _tell(load_job(file, options, plan.ranks)["job"]["dump_folder"], code, reason)
    return code


class Agent:
    """torchrun's agent in a thread, and the signals in the main one."""

    def __init__(self, words: list[str]):
        self._words = words
        self._first: float | None = None
        self._number = 0
        self._told: set[int] = set()
        self._failure: BaseException | None = None
        self._done = threading.Event()

    def run(self) -> tuple[int, str]:
        """Run the ranks; return their exit code and, if it is not 0, whose it is and why."""
        for name in NAMES:
            signal.signal(getattr(signal, name), self._handle)
        thread = threading.Thread(target=self._run, name="torchrun", daemon=True)
        thread.start()
        while not self._done.wait(0.2):
            self._pass_on()
        thread.join()
        code, reason = exit_code_of(self._failure)
        if self._number and (not self._told or ended_by(self._failure, self._number)):
            # No rank has come so far that it takes signals.
            name = signal.Signals(self._number).name
            print(before_the_first_step(name), flush=True)
            return 0, ""
        return code, reason

    def _pass_on(self) -> None:
        """Pass the signal that there was on to the ranks that have not had it: some may have been started since."""
        for pid in children() if self._number else ():
            if pid not in self._told:
                self._told.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, self._number)

    def _run(self) -> None:
        try:
            from torch.distributed import run as torchrun

            # It says that it takes no signals in a thread, and what we say better.
            for name in ("torch.distributed.elastic", "torch.distributed.run"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            torchrun.run(torchrun.parse_args(self._words))
        except BaseException as error:
            self._failure = error
        finally:
            self._done.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Pass the first signal on; kill the ranks at a second one."""
        if self._first is None:
            self._first, self._number = time.monotonic(), number
            self._pass_on()
        elif time.monotonic() - self._first >= SAME_S:
            for pid in children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    # Each leads a group of its own, with what it has started.
                    os.killpg(pid, signal.SIGKILL)
            name = signal.Signals(number).name
            os.write(2, f"A second signal, {name}: ended at once, and nothing more is saved\n".encode())
            os._exit(128 + number)


def children() -> list[int]:
    """Return the processes that this one's threads have started."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def ended_by(failure: Any, number: int) -> bool:
    """Whether all ranks that failed were ended by a signal: the one that was passed on, or torchrun's to the rest."""
    ranks = getattr(failure, "failures", None)
    return bool(ranks) and all(one.exitcode in (-number, -signal.SIGTERM) for one in ranks.values())


def exit_code_of(failure: Any) -> tuple[int, str]:
    """Return the exit code that torchrun's error stands for, and in a line whose it is and why.

    Of several ranks' codes the one that says most counts: the others are often what the first one has brought about.
    """
    if failure is None:
        return 0, ""
    ranks = getattr(failure, "failures", None)
    if not ranks:
        if isinstance(failure, SystemExit) and isinstance(failure.code, int):
            return failure.code, ""
        return FAILED, f"torchrun: {_first_line(str(failure)) or type(failure).__name__}"
    told = sorted(rank for rank, failure in ranks.items() if failure.exitcode in (2, 3))
    rank = told[0] if told else min(ranks, key=lambda rank: ranks[rank].timestamp)
    first = ranks[rank]
    code = first.exitcode if first.exitcode in (2, 3) else FAILED
    data = getattr(first, "error_file_data", None) or {}
    message = data.get("message")
    if isinstance(message, dict):
        message = message.get("message")
    if first.exitcode < 0:
        why = f"ended by {signal.Signals(-first.exitcode).name}"
    else:
        why = _first_line(message) if isinstance(message, str) and message != "<NONE>" else ""
        why = why or f"ended with exit code {first.exitcode}"
    return code, f"rank {rank}: {why}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _tell(folder: str, code: int, reason: str) -> None:
    """Say why the run has failed where rank 0 has not, or is not shown; write it where rank 0 could not know it."""
    path = Path(folder)
    status = read_status(path)
    by_rank_0 = reason.startswith("rank 0: ")
    is_shown = "0" in os.environ.get("LOG_RANK", "0").split(",")
    if not by_rank_0 or reason.startswith("rank 0: ended ") or not is_shown:
        print(reason, file=sys.stderr, flush=True)
    if status is None:
        return
    is_left = status.state == "running" and not is_alive(path, status)
    # A rank that is lost is what the others have failed of.
    if is_left or (status.state == "failed" and not by_rank_0):
        state = "stopped" if code == 3 else "failed"
        ended = dataclasses.replace(status, state=state, reason=reason, exit_code=code, time=now())
        with contextlib.suppress(OSError):
            replace(path / STATUS_FILE, ended)


if __name__ == "__main__":
    sys.exit(main())
