"""What a save costs that is whole: torch's writer, and ours with its checksums and manifest, in turn, in one process.

python -m benchmarks.saves --mib 1024 --folder /path/on/the/disk/in/question
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.console import at_least, measure, show
from benchmarks.measure import Spread, overhead_by_round


def ways(folder: Path) -> dict[str, Callable[[dict[str, Any]], None]]:
    """Return name -> how a state is saved."""
    import torch.distributed.checkpoint as dcp

    from nitp_titan.checkpoints.writer import WholeWriter

    def ours(state: dict[str, Any]) -> None:
        writer = WholeWriter(folder / "step-2", step=2, holds="everything", fingerprint={})
        dcp.save(state, storage_writer=writer, no_dist=True)

    return {
        "torch": lambda state: dcp.save(state, checkpoint_id=folder / "torch", no_dist=True),
        "ours": ours,
    }


def run(options: argparse.Namespace) -> int:
    """Run the benchmark; return the exit code."""
    from nitp_titan.runtime import prepare

    prepare()
    import torch
    from rich.table import Table

    results.check_writable(options.out)
    tensors = 64
    numbers = options.mib * 2**20 // 4 // tensors
    state = {f"layers.{i}.weight": torch.randn(numbers) for i in range(tensors)}
    seconds: dict[str, list[float]] = {"torch": [], "ours": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for turn in range(options.repeats + 1):
            for name, save in ways(Path(place)).items():
                for left in Path(place).iterdir():
                    shutil.rmtree(left)
                begin = time.perf_counter()
                save(state)
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - begin)
    over = overhead_by_round(seconds["ours"], seconds["torch"])
    result = {
        **results.machine_facts(),
        "mib": options.mib,
        "rounds": options.repeats,
        "seconds": {name: Spread.of(values).to_json() for name, values in seconds.items()},
        "overhead_percent_by_round": over.to_json(),
    }
    results.write(options.out, result)
    table = Table(title=f"a save of {options.mib} MiB")
    for column in ("writer", "seconds (median)", "MiB/s", "over torch's, by round"):
        table.add_column(column, justify="right")
    for name, values in seconds.items():
        median = statistics.median(values)
        by_round = f"{over.median:+.1f} % ({over.min:+.1f} .. {over.max:+.1f})" if name == "ours" else ""
        table.add_row(name, f"{median:.3f}", f"{options.mib / median:,.0f}", by_round)
    show(table, options.out)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.saves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1024, help="of the checkpoint (%(default)s)")
    parser.add_argument("--folder", type=Path, default=None, help="where it is saved (the system's temporary folder)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--out", type=Path, default=results.RESULTS / "cpu" / "saves.json", help="JSON file")
    options = parser.parse_args(arguments)
    at_least(parser, options, mib=1, repeats=1)
    options.device, options.verbose = "cpu", False
    return measure(run, options)


if __name__ == "__main__":
    sys.exit(main())
