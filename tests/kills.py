"""The kill matrix: real runs that are killed at random moments, and gone on with to their end.

    python -m tests.kills [--kills N] [--rows FILE.jsonl]          (make test-faults; KILLS=200 make test-faults)

Runs of several layouts are killed a few times each: one rank, the launcher, or all of them by SIGKILL, or the launcher
by SIGTERM; while they start, between two moments of a step, or while a checkpoint is saved. The same command goes on,
and in the end losses, gradient norms, learning rates, tokens seen and the whole last checkpoint must be, bit for bit,
those of a run that nobody disturbed. A kill alone never leads to a refusal, or to a checkpoint that is passed over.

What is drawn depends on the seed and the number of the run alone. With --rows each run is a line of a file, and those
that are there are not run again: many kills may take several sittings. Exits 1 where anything differed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitp_titan.runs.steps import steps_in
from tests.helpers.signalled import Started

STEPS, INTERVAL, KEPT = 16, 2, 2
KILLS_OF_A_RUN = 3
LAST = f"step-{STEPS}"
COMPARED = ("step", "loss_metrics/global_avg_loss", "loss_metrics/ntp_loss", "loss_metrics/nitp_loss", "grad_norm")
COMPARED += ("lr", "n_tokens_seen")

KINDS = ("all", "launcher", "rank", "term")
MOMENTS = ("starting", "step", "step", "saving")


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks, and what a job of them has."""

    ranks: int
    words: tuple[str, ...] = ()
    file: str = "train_configs/debug.toml"


def _parallel(**degrees: int) -> tuple[str, ...]:
    return tuple(f"--parallelism.{name}_parallel_degree={degree}" for name, degree in degrees.items())


_1F1B = ("--parallelism.pipeline_parallel_schedule=1F1B", "--parallelism.pipeline_parallel_microbatch_size=1")
LAYOUTS = {
    "one": Layout(1),
    "fsdp": Layout(2),
    "tp": Layout(2, _parallel(tensor=2)),
    "pp": Layout(2, (*_parallel(pipeline=2), *_1F1B)),
    "one, saved in the background": Layout(1, ("--checkpoint.async_mode=async",)),
    "cp": Layout(2, _parallel(context=2)),
    "ep": Layout(2, _parallel(expert=2), "train_configs/debug_moe.toml"),
    "fsdp, saved in the background": Layout(2, ("--checkpoint.async_mode=async",)),
    "tp + pp": Layout(4, (*_parallel(tensor=2, pipeline=2), *_1F1B)),
    "hsdp": Layout(4, ("--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=2")),
}


def command(layout: Layout, folder: Path) -> tuple[str, ...]:
    """Return the command that trains, and goes on."""
    return (
        *(sys.executable, "-m", "nitp_titan.cli", "train", layout.file, "--ngpu", str(layout.ranks)),
        f"--job.dump_folder={folder}",
        f"--training.steps={STEPS}",
        *("--training.seq_len=64", "--training.local_batch_size=4", "--training.global_batch_size=16"),
        *("--metrics.log_freq=1", "--nitp.geometry_freq=5", "--lr_scheduler.warmup_steps=3"),
        *("--checkpoint.enable", f"--checkpoint.interval={INTERVAL}", f"--checkpoint.keep_latest_k={KEPT}"),
        *layout.words,
    )


def descendants(run: Started) -> list[int]:
    """Return the ids of a command's processes, its own first."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(stat.parent.name))
    found = [run.process.pid]
    for pid in found:
        found += parents.get(pid, [])
    return found


def ranks(run: Started) -> list[int]:
    """Return the ids of the processes that are a rank; the command's own where none is yet."""
    found = []
    for pid in descendants(run):
        with contextlib.suppress(OSError):
            if b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    return found or [run.process.pid]


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's metrics; the last one may be half written."""
    lines = []
    with contextlib.suppress(OSError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def wait_for(moment: str, run: Started, folder: Path, generator: random.Random) -> str:
    """Wait for the moment of a kill, or for the end of the run; return what it was."""
    if moment == "starting":
        seconds = generator.uniform(0.1, 9)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(seconds)
        return f"{seconds:.1f} s after its start"
    saving = moment == "saving"
    # From the step on that the run goes on from: what was logged beyond it goes when its first step begins.
    target = generator.randrange(1, STEPS)
    later = generator.uniform(0, 0.05 if saving else 0.3)
    begin = time.monotonic()
    while run.process.poll() is None and time.monotonic() - begin < 120:
        lines = logged(folder)
        reached = bool(lines) and lines[-1]["step"] >= target and time.monotonic() - begin > 3
        if reached and (not saving or any((folder / "checkpoint").glob(".saving-*"))):
            break
        time.sleep(0.003)
    time.sleep(later)
    return f"{'saving after ' if saving else ''}step {target}"


def kill(kind: str, run: Started, generator: random.Random) -> None:
    """Kill what is left of a run."""
    if kind == "term":
        targets, number = [run.process.pid], signal.SIGTERM
    elif kind == "launcher":
        targets, number = [run.process.pid], signal.SIGKILL
    elif kind == "rank":
        targets, number = [generator.choice(ranks(run))], signal.SIGKILL
    else:
        targets, number = descendants(run), signal.SIGKILL
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """Return all that the last checkpoint holds, name by name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    place = folder / "checkpoint" / LAST
    _load_state_dict(found, dcp.FileSystemReader(place), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    flat: dict[str, Any] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                flatten(f"{prefix}.{name}", inner)
        else:
            flat[prefix] = value

    flatten("", found)
    # Nothing seeds these two: what has no checkpoint yet begins with others at each start.
    return {name: value for name, value in flat.items() if not name.endswith((".python", ".numpy"))}


def difference(folder: Path, reference: Path) -> str:
    """Return in what a run differs from another one; empty where it does not, to the last bit."""
    import torch

    curves = [[{key: line.get(key) for key in COMPARED} for line in logged(place)] for place in (folder, reference)]
    if curves[0] != curves[1]:
        at = next((b["step"] for a, b in zip(*curves, strict=False) if a != b), "the end")
        return f"metrics differ at step {at}"
    ours, theirs = last_checkpoint(folder), last_checkpoint(reference)
    if ours.keys() != theirs.keys():
        return f"the last checkpoint differs in {sorted(ours.keys() ^ theirs.keys())[:3]}"
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        if not same:
            return f"the last checkpoint differs in {name}"
    left = [path.name for path in (folder / "checkpoint").iterdir()]
    kept = [f"step-{STEPS - INTERVAL * i}" for i in range(KEPT)]
    return "" if sorted(left) == sorted(kept) else f"left are {sorted(left)}, expected {kept}"


def disturbed(number: int, seed: int, work: Path, reference: Path, name: str) -> dict[str, Any]:
    """Kill a run a few times, go on with it to its end, and compare; return its row."""
    generator = random.Random(f"{seed}/{number}")
    layout, folder = LAYOUTS[name], work / f"run-{number}"
    kills: list[str] = []
    wrong = said = ""
    for _ in range(KILLS_OF_A_RUN):
        kind, moment = generator.choice(KINDS), generator.choice(MOMENTS)
        run = Started(command(layout, folder), log_of(folder))
        when = wait_for(moment, run, folder, generator)
        ended = run.process.poll()
        if ended is None:
            kill(kind, run, generator)
        code = run.ended(180)
        said += run.said
        kills.append(f"{kind}, {when}" + (": it had ended" if ended is not None else ""))
        if code == 2:
            wrong = wrong or f"refused after: {'; '.join(kills)}"
    run = Started(command(layout, folder), log_of(folder))
    if code := run.ended(300):
        wrong = wrong or f"exit code {code} without a kill"
    elif "is passed over" in said + run.said:
        wrong = wrong or "a checkpoint was passed over"
    return {
        "run": number,
        "seed": seed,
        "layout": name,
        "kills": kills,
        "kinds": [kill.partition(",")[0] for kill in kills],
        "differs": wrong or difference(folder, reference),
    }


def log_of(folder: Path) -> Path:
    """Return where the present start of a run writes what it says."""
    return folder.with_suffix(".log")


def undisturbed(name: str, work: Path) -> Path:
    """Return a run that nobody disturbs, which is made once."""
    folder = work / f"whole-{name.replace(' ', '-').replace(',', '')}"
    if not (folder / "checkpoint" / LAST).is_dir():
        run = Started(command(LAYOUTS[name], folder), log_of(folder))
        assert run.ended(300) == 0, run.said
        assert steps_in(folder / "checkpoint")[-1] == STEPS
    return folder


def read_rows(file: Path | None) -> list[dict[str, Any]]:
    """Return the runs of earlier sittings."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return kills by layout and kind as a table."""
    lines = [f"| layout | {' | '.join(KINDS)} | runs | not bitwise |", f"|---|{'---|' * len(KINDS)}---|---|"]
    for name in dict.fromkeys(row["layout"] for row in rows):
        of_layout = [row for row in rows if row["layout"] == name]
        kinds = Counter(kind for row in of_layout for kind in row["kinds"])
        wrong = sum(bool(row["differs"]) for row in of_layout)
        lines.append(f"| {name} | {' | '.join(str(kinds[kind]) for kind in KINDS)} | {len(of_layout)} | {wrong} |")
    return lines


def main() -> int:
    """Run the matrix; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6, help="in all, three a run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--rows", type=Path, default=None, metavar="FILE.jsonl", help="a line for each run")
    arguments = parser.parse_args()
    rows = [row for row in read_rows(arguments.rows) if row["seed"] == arguments.seed]
    done = {row["run"] for row in rows}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for number in range(-(-arguments.kills // KILLS_OF_A_RUN)):
            if number in done:
                continue
            name = list(LAYOUTS)[number % len(LAYOUTS)]
            begin = time.monotonic()
            row = disturbed(number, arguments.seed, work, undisturbed(name, work), name)
            rows.append(row)
            if arguments.rows:
                with arguments.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            verdict = row["differs"] or "bitwise the same"
            print(
                f"{number:3} {name}: {'; '.join(row['kills'])}: {verdict} ({time.monotonic() - begin:.0f} s)",
                flush=True,
            )
            if row["differs"]:
                print(log_of(work / f"run-{number}").read_text()[-3000:], flush=True)
    print(*table(rows), sep="\n")
    return int(any(row["differs"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
