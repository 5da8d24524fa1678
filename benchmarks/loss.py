"""The loss alone, forward and backward, in turn: implementations x tokens x vocabularies x widths, and NITP's share.

python -m benchmarks.loss --device auto
python -m benchmarks.loss --tokens 8192,32768 --vocab 152064 --width 896,1280 --implementations ours,liger
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import results
from benchmarks.console import at_least, measure, show
from benchmarks.measure import DeviceClock, Spread, overhead_by_round, overhead_of_medians, take_turns_or_drop_out
from nitp_titan.nitp.config import CHUNK_TOKENS

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.heads import Case

BASELINE = "ours"
WITH_NITP = "ours+nitp"
MIB = 2**20

# Whole sizes of the paper's 0.5B and 9B-A1B on a GPU; on a CPU as much as shows that it works.
_DEFAULTS = {
    "gpu": {
        "tokens": "8192,32768",
        "vocab": "152064",
        "width": "896,1280",
        "dtype": "bfloat16",
        "chunk_tokens": CHUNK_TOKENS,
    },
    "cpu": {"tokens": "256,512", "vocab": "2048,8192", "width": "64", "dtype": "float32", "chunk_tokens": 128},
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; those that are not given depend on the device and stay None."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add_sizes(parser)
    parser.add_argument("--implementations", default="", help="with commas (all)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(on a GPU)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed calls of a turn (%(default)s)")
    parser.add_argument("--verbose", action="store_true", help="logs")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (benchmarks/results/DEVICE/loss.json)")
    options = parser.parse_args(arguments)
    at_least(parser, options, repeats=1, steps=1)
    return options


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`cases` reads."""
    gpu, cpu = _DEFAULTS["gpu"], _DEFAULTS["cpu"]
    parser.add_argument("--tokens", help=f"with commas ({gpu['tokens']}; on a CPU {cpu['tokens']})")
    parser.add_argument("--vocab", help=f"with commas ({gpu['vocab']}; on a CPU {cpu['vocab']})")
    parser.add_argument("--width", help=f"with commas ({gpu['width']}; on a CPU {cpu['width']})")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="(bfloat16; on a CPU float32)")
    sizes = f"({gpu['chunk_tokens']}; on a CPU {cpu['chunk_tokens']})"
    parser.add_argument("--chunk-tokens", type=int, help=f"of ours {sizes}")
    parser.add_argument("--seq-len", type=int, default=8192, help="at most so many tokens a sequence (%(default)s)")


def cases(options: argparse.Namespace, device: str, *, compile: bool) -> list[Case]:
    """Return the cases, every combination of the options' lists.

    Raises:
        ValueError: a size that is no number of at least 1.
    """
    from benchmarks.heads import Case

    defaults = _DEFAULTS["cpu" if device == "cpu" else "gpu"]
    given = defaults | {name: value for name in defaults if (value := getattr(options, name)) is not None}
    for name, value in (("chunk-tokens", given["chunk_tokens"]), ("seq-len", options.seq_len)):
        if value < 1:
            raise ValueError(f"--{name}: found {value}, expected at least 1")
    lists = {}
    for name in ("tokens", "vocab", "width"):
        words = given[name].split(",")
        lists[name] = [int(word) for word in words if word.strip().isdecimal() and int(word) > 0]
        if len(lists[name]) < len(words):
            raise ValueError(f"--{name}: found {given[name]!r}, expected whole numbers of at least 1, with commas")
    found = []
    for tokens, vocab, width in itertools.product(*lists.values()):
        seq_len = min(tokens, options.seq_len)
        if tokens % seq_len:
            raise ValueError(f"--tokens: found {tokens}, expected a multiple of --seq-len {seq_len}")
        found.append(
            Case(
                tokens=tokens,
                vocab_size=vocab,
                dim=width,
                dtype=given["dtype"],
                device=device,
                seq_len=seq_len,
                compile=compile,
                chunk_tokens=given["chunk_tokens"],
            )
        )
    return found


def run_case(case: Case, names: Sequence[str], *, rounds: int, steps: int) -> dict[str, Any]:
    """Measure one case; see :func:`summarize_case` for what it returns."""
    import torch

    from benchmarks.heads import IMPLEMENTATIONS, Head, Problem, Unavailable
    from benchmarks.memory import usage_of

    torch.compiler.reset()
    problem = Problem(case)
    heads: dict[str, Head] = {}
    memory: dict[str, Memory] = {}
    losses: dict[str, float] = {}
    skipped: dict[str, str] = {}

    def skip(name: str, error: BaseException) -> None:
        problem.forget()
        for found in (heads, memory, losses):
            found.pop(name, None)
        kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
        skipped[name] = kind + str(error).partition("\n")[0]

    for name in names:
        try:
            head = IMPLEMENTATIONS[name][0](problem)
            head.step()  # compiles
            losses[name] = head.step()
            head.forget()
            peak = usage_of(lambda head=head: head.run(1), case.device).peak
            head.forget()
            memory[name] = Memory(peak, usage_of(head.losses, case.device).kept)
            head.forget()
            heads[name] = head
        except Exception as error:  # others' kernels fail in ways of their own; the rest goes on
            skip(name, error)
    clock = DeviceClock(case.device)
    seconds = take_turns_or_drop_out(heads, skip, rounds=rounds, steps=steps, settle=1, clock=clock)
    return summarize_case(case, seconds, memory, losses, skipped)


class Memory(NamedTuple):
    """Bytes that an implementation takes."""

    peak: int
    """At most, in forward and backward, with the gradients that it leaves."""
    kept: int
    """Between forward and backward."""


def summarize_case(
    case: Case,
    seconds: Mapping[str, Sequence[float]],
    memory: Mapping[str, Memory],
    losses: Mapping[str, float],
    skipped: Mapping[str, str],
) -> dict[str, Any]:
    """Return a case's result: sizes, ``implementations`` by name, ``skipped`` with reasons, and ``nitp``.

    ``nitp`` is what the NITP term adds to our cross-entropy: time in per cent, bytes of the peak and of what is kept.
    """
    base = BASELINE if BASELINE in seconds else next(iter(seconds), "")
    found = {
        name: {
            "ms": Spread.of(1000 * s for s in values).to_json(),
            "time_over": {base: round(statistics.median(values) / statistics.median(seconds[base]), 4)},
            "peak_memory_mib": round(memory[name].peak / MIB, 3),
            "kept_memory_mib": round(memory[name].kept / MIB, 3),
            "loss": losses[name],
        }
        for name, values in seconds.items()
    }
    result: dict[str, Any] = {
        "tokens": case.tokens,
        "vocabulary": case.vocab_size,
        "width": case.dim,
        "dtype": case.dtype,
        "compile": case.compile,
        "chunk_tokens": case.chunk_tokens,
        "implementations": found,
        "skipped": dict(skipped),
        "largest_relative_difference_of_losses": max((abs(x / losses[base] - 1) for x in losses.values()), default=0),
    }
    if BASELINE in seconds and WITH_NITP in seconds:
        alone, joint = memory[BASELINE], memory[WITH_NITP]
        result["nitp"] = {
            "time_overhead_percent": round(overhead_of_medians(seconds[WITH_NITP], seconds[BASELINE]), 3),
            "by_round": overhead_by_round(seconds[WITH_NITP], seconds[BASELINE]).to_json(3),
            "peak_above_cross_entropy_mib": round((joint.peak - alone.peak) / MIB, 3),
            "kept_above_cross_entropy_mib": round((joint.kept - alone.kept) / MIB, 3),
        }
    return result


def size_of(case: Mapping[str, Any]) -> str:
    """Return a case's tokens x vocabulary x width."""
    return " x ".join(f"{case[name]:,}" for name in ("tokens", "vocabulary", "width"))


def table(result: Mapping[str, Any]) -> Table:
    """Return what people look at of a result."""
    from rich.table import Table

    shown = Table(title="forward and backward of the loss")
    shown.add_column("tokens x vocabulary x width", no_wrap=True)
    shown.add_column("implementation", no_wrap=True)
    for name in ("ms (min .. max)", f"over {BASELINE}", "peak MiB", "kept MiB"):
        shown.add_column(name, justify="right", no_wrap=True)
    for case in result["cases"]:
        size = size_of(case)
        for name, values in case["implementations"].items():
            ms, [ratio] = values["ms"], values["time_over"].values()
            times = f"{ms['median']:.2f} ({ms['min']:.2f} .. {ms['max']:.2f})"
            memory = f"{values['peak_memory_mib']:,.1f}", f"{values['kept_memory_mib']:,.1f}"
            shown.add_row(size, name, times, f"{ratio:.2f}", *memory)
        for name in case["skipped"]:
            shown.add_row(size, name, *"----")
        if nitp := case.get("nitp"):
            memory = [f"{nitp[f'{what}_above_cross_entropy_mib']:+,.1f}" for what in ("peak", "kept")]
            shown.add_row(size, "NITP adds", f"{nitp['time_overhead_percent']:+.1f} %", "", *memory)
        shown.add_section()
    skipped = {name: why for case in result["cases"] for name, why in case["skipped"].items()}
    caption = [f"{result['device']}, torch {result['torch']}"]
    if result["device_type"] == "cpu":
        caption.append(f"a CPU's {result['clock']}: ratios at best, no measure of a GPU")
    shown.caption = "\n".join(caption + [f"{name}: {why}" for name, why in skipped.items()])
    shown.caption_justify = "left"
    return shown


def run(options: argparse.Namespace) -> int:
    """Run the benchmark; return the exit code."""
    from nitp_titan.runtime import prepare

    prepare()
    from torchtitan.tools import utils

    from benchmarks.heads import IMPLEMENTATIONS

    names = options.implementations.split(",") if options.implementations else list(IMPLEMENTATIONS)
    if unknown := [name for name in names if name not in IMPLEMENTATIONS]:
        raise ValueError(f"--implementations: found {unknown[0]!r}, expected some of {', '.join(IMPLEMENTATIONS)}")
    facts = results.machine_facts()
    out = options.out or results.default_path("loss", "", facts["device"], facts["device_type"])
    results.check_writable(out)
    meanings = {name: IMPLEMENTATIONS[name][1] for name in names}
    result: dict[str, Any] = {**facts, "meanings": meanings, "rounds": options.repeats}
    result |= {"clock": DeviceClock(utils.device_type).kind, "cases": []}
    compile = utils.device_type != "cpu" if options.compile is None else options.compile
    for case in cases(options, utils.device_type, compile=compile):
        print(f"{case.tokens:,} tokens, {case.vocab_size:,} words, width {case.dim:,}", file=sys.stderr, flush=True)
        result["cases"].append(run_case(case, names, rounds=options.repeats, steps=options.steps))
        results.write(out, result)
    show(table(result), out)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a wrong option."""
    return measure(run, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
