"""The memory of the loss alone at real sizes, counted without a device: tensors that have no data, and their bytes.

python -m benchmarks.loss_memory
python -m benchmarks.loss_memory --tokens 65536 --vocab 152064 --width 3072

Forward and backward run eagerly, operator by operator: compiled, a loss holds less. Kernels that take memory inside one
operator (Liger's, torch's chunked one) cannot be counted so.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import loss, results
from benchmarks.console import choose_device, quiet_logs, show

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.heads import Case

IMPLEMENTATIONS = (
    "ours",
    "ours+nitp",
    "ours_in_halved_chunks",
    "ours_in_doubled_chunks",
    "ours_recomputed",
    "ours_recomputed+nitp",
    "torchtitan_chunked",
    "torchtitan_plain",
)


def count(case: Case) -> dict[str, Any]:
    """Return sizes and, for each implementation, the MiB of its peak and of what it keeps for the backward pass.

    ``nitp_adds`` is what the NITP term adds to ours and to its reference.
    """
    from benchmarks import heads
    from benchmarks.live_bytes import LiveBytes

    problem = heads.Problem(case)
    found = {}
    for name in IMPLEMENTATIONS:
        head = heads.IMPLEMENTATIONS[name][0](problem)
        parameters = head.more.parameters() if head.more is not None else ()
        problem.forget()
        gc.collect()
        inputs = [problem.h_BLD, problem.weight_VD, problem.labels_BL, problem.positions_BL, *parameters]
        with LiveBytes(inputs) as live:
            total, _ = head.losses()
            kept = live.now
            total.backward()
        found[name] = {
            "peak_memory_mib": round(live.peak / loss.MIB, 3),
            "kept_memory_mib": round(kept / loss.MIB, 3),
        }
        head.forget()
    added = {
        name: {key: round(found[f"{name}+nitp"][key] - value, 3) for key, value in found[name].items()}
        for name in ("ours", "ours_recomputed")
    }
    sizes = {"tokens": case.tokens, "vocabulary": case.vocab_size, "width": case.dim, "dtype": case.dtype}
    return {**sizes, "chunk_tokens": case.chunk_tokens, "implementations": found, "nitp_adds": added}


def rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return (size, implementation, peak, kept) of everything counted."""
    return [
        (
            loss.size_of(case),
            name,
            f"{values['peak_memory_mib']:,.0f}",
            f"{values['kept_memory_mib']:,.0f}",
        )
        for case in result["cases"]
        for name, values in case["implementations"].items()
    ]


def table(result: Mapping[str, Any]) -> Table:
    """Return what people look at of a result."""
    from rich.table import Table

    shown = Table(title="forward and backward of the loss, eager: live bytes of tensors without data")
    for name in ("tokens x vocabulary x width", "implementation"):
        shown.add_column(name, no_wrap=True)
    for name in ("peak MiB", "kept MiB"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows(result):
        shown.add_row(*row, end_section=row[1] == IMPLEMENTATIONS[-1])
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.loss_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    loss.add_sizes(parser)
    out = results.RESULTS / "counted" / "loss-memory.json"
    parser.add_argument("--out", type=Path, default=out, help="JSON file (benchmarks/results/counted/loss-memory.json)")
    options = parser.parse_args(arguments)
    choose_device("cpu")
    try:
        cases = loss.cases(options, "meta", compile=False)
        results.check_writable(options.out)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    from nitp_titan.runtime import prepare

    prepare()
    result: dict[str, Any] = {**results.machine_facts(), "device": "none: tensors without data", "device_type": "meta"}
    with quiet_logs(verbose=False):
        result["cases"] = [count(case) for case in cases]
    results.write(options.out, result)
    show(table(result), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
