"""Fills docs/performance.md from the roofline and from what lies in benchmarks/results.

    python -m benchmarks.page [--check]

A block of the page stands between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``; everything else is text.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.bars import BARS, CARDS, LARGE, SMALL, UNMEASURED, Results, at
from benchmarks.loss import size_of
from benchmarks.loss_memory import rows as memory_rows
from benchmarks.results import RESULTS, ROOT
from benchmarks.roofline import MFUS, Roofline, cross_entropy_operations, loss_operations, roofline, rows, seconds_of
from benchmarks.summary import overheads
from benchmarks.tiles import TORCHS
from nitp_titan.models.flavors import CONTEXT, FLAVORS

PAGE = ROOT / "docs" / "performance.md"
SIZES = {"0.5B": 4, "9B-A1B": 2}
"""Flavors of the page, and the sequences of a step."""
KERNELS = 16
"""Of which the page has the times."""


def bars(results: Results) -> list[str]:
    """Return the table of bars."""
    cards = " | ".join(f"one {card}" for card in CARDS)
    head = [f"| bf16, compiled, context 8192 | must | beyond | {cards} |", f"|---|---|---|{'---|' * len(CARDS)}"]
    return head + [bar.row(results) for bar in BARS]


def throughput(results: Results) -> list[str]:
    """Return a table of training steps for each result of a GPU."""
    lines: list[str] = []
    for result in results.throughput:
        job = f"`{result['config']}`, {result['tokens_per_step']:,} tokens a step"
        lines += [
            f"{job}, {result['ranks']} x {_made_by(result)}",
            "",
            f"| variant | tokens/s | MFU | step ms (min .. max) | peak GiB | over {result['baseline']} | by round |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, values in result["variants"].items():
            step, mfu = values["step_ms"], values["mfu_percent"]
            time, by_round, _ = overheads(result, name)
            lines.append(
                f"| {name} | {values['tokens_per_second']:,.0f} | {'n/a' if mfu is None else f'{mfu:.1f} %'} | "
                f"{step['median']:.1f} ({step['min']:.1f} .. {step['max']:.1f}) | {values['peak_memory_gib']:.2f} | "
                f"{time} | {by_round} |"
            )
        notes = [f"{name}: {note}" for name, values in result["variants"].items() for note in values["notes"]]
        notes += at(result, "extrapolation", "arithmetic") or []
        lines += ["", *[f"- {note}" for note in notes], *([""] if notes else [])]
    return lines or [f"Training steps on a GPU: {UNMEASURED}."]


def cpu_ratios(results: Results) -> list[str]:
    """Return what a CPU can tell: ratios of time and memory on toy models, of steps and of the loss."""
    lines = ["| job, on a CPU | variant | time, by round | peak memory |", "|---|---|---|---|"]
    for result in results.throughput:
        for name in result["overhead_percent"]:
            _, by_round, memory = overheads(result, name)
            lines.append(f"| `{result['config']}` | {name} over {result['baseline']} | {by_round} | {memory} |")
    found = [*results.throughput, *results.loss]

    def all_of(key: str, length: int | None = None) -> str:
        return ", ".join(sorted({result[key][:length] for result in found}))

    lines += ["", f"{all_of('device')}; torch {all_of('torch')}; commit {all_of('commit', 9)}."] if found else []
    lines += ["", "| loss, on a CPU | implementation | time in ours | peak MiB |", "|---|---|---|---|"]
    for case in (case for result in results.loss for case in result["cases"]):
        for name, values in case["implementations"].items():
            [ratio] = values["time_over"].values()
            lines.append(f"| {size_of(case)} | {name} | {ratio:.2f} | {values['peak_memory_mib']:.1f} |")
    return lines


def _made_by(result: Mapping[str, Any]) -> str:
    return f"{result['device']}, torch {result['torch']}, commit {result['commit'][:9]}, {result['rounds']} rounds:"


def losses(results: Results) -> list[str]:
    """Return a table of the loss alone for each case of a GPU."""
    lines: list[str] = []
    for result in results.loss:
        lines += [
            _made_by(result),
            "",
            "| tokens x vocabulary x width | implementation | ms (min .. max) | in ours | peak MiB | kept MiB |",
            "|---|---|---|---|---|---|",
        ]
        for case in result["cases"]:
            size = size_of(case)
            for name, values in case["implementations"].items():
                ms, [ratio] = values["ms"], values["time_over"].values()
                lines.append(
                    f"| {size} | {name} | {ms['median']:.2f} ({ms['min']:.2f} .. {ms['max']:.2f}) | {ratio:.2f} | "
                    f"{values['peak_memory_mib']:,.0f} | {values['kept_memory_mib']:,.0f} |"
                )
            lines += [f"| {size} | {name} | - | - | - | {why} |" for name, why in case["skipped"].items()]
        lines.append("")
    return lines or [f"The loss on a GPU: {UNMEASURED}."]


def counted(results: Results) -> list[str]:
    """Return what the loss takes by count, and what NITP adds to it."""
    lines = ["| tokens x vocabulary x width | implementation | peak MiB | kept MiB |", "|---|---|---|---|"]
    return lines + [f"| {' | '.join(row)} |" for result in results.loss for row in memory_rows(result)]


def limits(flavor: str) -> list[str]:
    """Return a flavor's roofline, and what it comes to in a step."""
    line = roofline(flavor, sequences=SIZES[flavor])
    mfus = " | ".join(f"{100 * mfu:.0f} %" for mfu in MFUS)
    shares = " | ".join(f"{line.overhead_percent(mfu):.2f} %" for mfu in MFUS)
    return [
        "| operation | GFLOPs | MB | ms at the limit | limit |",
        "|---|---|---|---|---|",
        *[f"| {' | '.join(row)} |" for row in rows(line)],
        "",
        f"| {flavor} without NITP, share of the peak (MFU) | {mfus} |",
        f"|---{'|---' * len(MFUS)}|",
        f"| NITP at its limits, over that step | {shares} |",
    ]


def loss_limits() -> list[str]:
    """Return what NITP's term and the cross-entropy of one sequence take at their limits, and their ratio."""
    lines = [
        "| loss of 8,192 tokens, ms at the limits | cross-entropy | NITP | NITP over it, time | FLOPs |",
        "|---|---|---|---|---|",
    ]
    for flavor in SIZES:
        shape = FLAVORS[flavor].shape
        alone, term = (
            cross_entropy_operations(shape.dim, CONTEXT, shape.vocab_size),
            loss_operations(shape.dim, CONTEXT),
        )
        time = seconds_of(term) / seconds_of(alone)
        work = sum(op.flops for op in term) / sum(op.flops for op in alone)
        milliseconds = f"{1e3 * seconds_of(alone):.2f} | {1e3 * seconds_of(term):.2f}"
        lines.append(f"| {flavor} | {milliseconds} | {100 * time:.1f} % | {100 * work:.1f} % |")
    return lines


def where_time_goes(results: Results) -> list[str]:
    """Return the groups of kernels of every step that was profiled, and the kernels of most time of one of them."""
    profiles = [
        (result, name, found) for result in results.throughput for name, found in result.get("profiles", {}).items()
    ]
    if not profiles:
        return [f"A step's kernels: {UNMEASURED}."]
    groups = list(dict.fromkeys(group for _, _, found in profiles for group in found["groups"]))
    lines = [
        f"| ms of a profiled step | variant | {' | '.join(groups)} | nothing ran |",
        f"|---|---|{'---|' * len(groups)}---|",
    ]
    for result, name, found in profiles:
        figures = [f"{found['groups'].get(group, 0):.1f}" for group in groups]
        depth = at(result, "variants", name, "layers")
        what = f"`{result['config']}`, {depth} blocks{_recomputation(result)}, {result['device']}"
        lines.append(f"| {what} | {name} | {' | '.join(figures)} | {found['idle_ms']:.1f} |")
    # Those of NITP in the smallest model, where there are any.
    result, name, found = min(profiles, key=lambda p: (Path(p[0]["config"]).stem != SMALL, p[1] != "nitp"))
    what = f"`{result['config']}`, {name}, {result['device']}"
    lines += ["", f"The kernels of most time of {what}:", "", "| ms | times | kernel |", "|---|---|---|"]
    for row in found["kernels"][:KERNELS]:
        lines.append(f"| {row['ms']:.2f} | {row['count']} | `{row['name'][:90]}` |")
    return lines


def _recomputation(result: Mapping[str, Any]) -> str:
    option = "--activation_checkpoint.mode="
    found = [word.removeprefix(option) for word in result["job_overrides"] if word.startswith(option)]
    return f", recomputation {found[-1]}" if found else ""


def experts(results: Results) -> list[str]:
    """Return a table of the routed experts alone for each case of a GPU."""
    lines: list[str] = []
    for result in results.experts:
        lines += [
            _made_by(result),
            "",
            "| experts of a block, forward and backward | implementation | ms (min .. max) | TFLOPS | limit ms |",
            "|---|---|---|---|---|",
        ]
        for case in result["experts"]:
            for name, values in case["implementations"].items():
                times = "{median:.2f} ({min:.2f} .. {max:.2f})".format(**values["ms"])
                size = f"{case['flavor']}, {case['tokens']:,} tokens"
                lines.append(f"| {size} | {name} | {times} | {values['tflops']:.0f} | {case['limit_ms']:.2f} |")
        lines.append("")
    return lines or [f"The experts on a GPU: {UNMEASURED}."]


def attention(results: Results) -> list[str]:
    """Return a table of flex attention's tiles for each case of a GPU, the fastest first."""
    lines: list[str] = []
    for result in results.attention:
        lines += [
            _made_by(result),
            "",
            "| flex attention | tiles, warps, stages | ms (min .. max) | in torch's | error |",
            "|---|---|---|---|---|",
        ]
        for case in result["attention"]:
            size = f"{case['flavor']}, {case['sequences']} x {case['seq_len']:,} tokens"
            for direction in ("forward", "backward"):
                rows = case.get(direction, {})
                base = at(rows, TORCHS, "ms", "median")
                for name, row in sorted(rows.items(), key=lambda item: item[1]["ms"]["median"]):
                    times = "{median:.2f} ({min:.2f} .. {max:.2f})".format(**row["ms"])
                    ratio = f"{row['ms']['median'] / base:.2f}" if base else "n/a"
                    lines.append(f"| {size}, {direction} | {name} | {times} | {ratio} | {row['error']:.4f} |")
        lines.append("")
    return lines or [f"Flex attention's tiles on a GPU: {UNMEASURED}."]


def gap(results: Results) -> list[str]:
    """Return what NITP took beside what it takes at its limits."""
    lines = ["| | at an H100's limits | on one H100 | between | on one H200 |", "|---|---|---|---|---|"]
    for flavor, config, whole in (("0.5B", SMALL, True), ("9B-A1B", LARGE, False)):
        line = roofline(flavor, sequences=SIZES[flavor])
        found = [_gap(replace(results, card=card), config, whole, line) for card in CARDS]
        between = UNMEASURED if found[0] is None else f"{found[0] - 1e3 * line.nitp_seconds:+.2f}"
        h100, h200 = (UNMEASURED if ms is None else f"{ms:.2f}" for ms in found)
        figures = f"{1e3 * line.nitp_seconds:.2f} | {h100} | {between} | {h200}"
        lines.append(f"| {flavor}, ms a step of {line.tokens:,} tokens | {figures} |")
    return lines


def _gap(results: Results, config: str, whole: bool, line: Roofline) -> float | None:
    paths = [("variants", name, "step_ms", "median") for name in ("ntp", "nitp")]
    result = results.longest(config, *paths, whole=whole)
    # Another batch's time has another limit.
    if result is None or result["tokens_per_step"] != line.tokens:
        return None
    without, with_nitp = (at(result, *path) for path in paths)
    return with_nitp - without


def blocks(folder: Path = RESULTS) -> dict[str, list[str]]:
    """Return the lines of every block of the page."""
    gpu, cpu = Results.read(folder, "gpu"), Results.read(folder, "cpu")
    return {
        "bars": bars(gpu),
        "throughput": throughput(gpu),
        "loss": losses(gpu),
        "gap": gap(gpu),
        "kernels": where_time_goes(gpu),
        "experts": experts(gpu),
        "attention": attention(gpu),
        "loss limits": loss_limits(),
        "counted": counted(Results.read(folder, "meta")),
        "cpu": cpu_ratios(cpu),
        **{f"roofline {flavor}": limits(flavor) for flavor in SIZES},
    }


def fill(text: str, found: Mapping[str, Sequence[str]]) -> str:
    """Return a page with its blocks put in.

    Raises:
        ValueError: the page has a block that there is not, or lacks one that there is.
    """
    pattern = re.compile(r"(<!-- begin: (.+?) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)
    names = [match[2] for match in pattern.finditer(text)]
    if sorted(names) != sorted(found):
        raise ValueError(f"{PAGE.name} has the blocks {', '.join(names)}, expected {', '.join(found)}, each once")
    return pattern.sub(lambda match: match[1] + "\n".join(found[match[2]]).strip("\n") + "\n" + match[3], text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 where ``--check`` finds the page behind, 2 for a bad result."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; say whether the page is as it should be")
    options = parser.parse_args(arguments)
    text = PAGE.read_text()
    try:
        filled = fill(text, blocks())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not options.check:
        PAGE.write_text(filled)
    elif filled != text:
        print("docs/performance.md is behind its results: python -m benchmarks.page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
