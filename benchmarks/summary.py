"""From the times of a race to what is written and shown. Plain arithmetic, free of torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.depth import Slice, extrapolate
from benchmarks.jobs import Entry
from benchmarks.measure import Spread, overhead_by_round, overhead_of_medians, overhead_percent
from benchmarks.variants import BASELINE
from nitp_titan.tools.estimate.memory import GIB

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What is known of a variant before it is timed."""

    parameters: int
    """Of the model as it trains, projector or MTP head included."""
    state_bytes: int
    """Parameters, buffers and optimizer states of a rank."""
    peak_bytes: int
    """Memory of the rank that takes most, of this variant alone."""
    first_loss: float
    """Of the first step."""


def summarize(
    about: Mapping[str, Any],
    entries: Sequence[Entry],
    figures: Mapping[str, Figures],
    seconds: Mapping[str, Sequence[float]],
    *,
    full_layers: int | None = None,
) -> dict[str, Any]:
    """Return the result of a race as it is written.

    Args:
        about: facts to begin with; ``ranks`` and ``peak_flops`` (None for a CPU) are read.
        entries: what ran, in order.
        figures: by name.
        seconds: name -> seconds a step of each round.
        full_layers: depth of the whole model, where the entries are slices of it.
    """
    variants = {entry.name: _variant(about, entry, figures[entry.name], seconds[entry.name]) for entry in entries}
    base = BASELINE if BASELINE in variants else entries[0].name
    # A slice with fewer blocks is only for the extrapolation.
    layers = {entry.name: entry.layers for entry in entries}
    rest = [name for name in variants if name != base and layers[name] == layers[base]]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        **about,
        "rounds": len(seconds[base]),
        "order": list(variants),
        "tokens_per_step": entries[0].tokens_per_step,
        "variants": variants,
        "baseline": base,
        "overhead_percent": {name: round(overhead_of_medians(seconds[name], seconds[base]), 4) for name in rest},
        "overhead_percent_by_round": {name: overhead_by_round(seconds[name], seconds[base]).to_json() for name in rest},
        "peak_memory_overhead_percent": {
            name: round(overhead_percent(figures[name].peak_bytes, figures[base].peak_bytes), 4) for name in rest
        },
        # Row over column: the row's speed in the column's.
        "speed_over": {
            name: {other: round(medians[other] / medians[name], 4) for other in (base, *rest) if other != name}
            for name in (base, *rest)
        },
    }
    if {"nitp", "mtp"} <= set(rest) and result["overhead_percent"]["mtp"] > 0:
        share = result["overhead_percent"]["nitp"] / result["overhead_percent"]["mtp"]
        result["nitp_share_of_mtp_overhead"] = round(share, 4)
    if full_layers is not None:
        result["extrapolation"] = _extrapolation(entries, medians, full_layers)
        rounds = [{name: values[i] for name, values in seconds.items()} for i in range(len(seconds[base]))]
        by_round = [_extrapolation(entries, values, full_layers).get("overhead_percent") for values in rounds]
        if result["extrapolation"].get("overhead_percent") and all(by_round):
            result["extrapolation"]["overhead_percent_by_round"] = {
                name: Spread.of(values[name] for values in by_round).to_json() for name in by_round[0]
            }
    return result


def _variant(about: Mapping[str, Any], entry: Entry, figures: Figures, seconds: Sequence[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    tokens_per_second = entry.tokens_per_step / median
    flops = entry.flops_per_token()
    mfu = None
    if about["peak_flops"]:
        mfu = round(100 * flops * tokens_per_second / about["ranks"] / about["peak_flops"], 2)
    return {
        "tokens_per_second": round(tokens_per_second, 1),
        "mfu_percent": mfu,
        "step_ms": Spread.of(1000 * s for s in seconds).to_json(),
        "peak_memory_gib": round(figures.peak_bytes / GIB, 4),
        "meaning": entry.variant.meaning,
        "trainer": entry.variant.trainer,
        "loss": entry.loss(),
        "notes": entry.notes(),
        "overrides": list(entry.variant.overrides),
        "layers": entry.layers,
        "parameters": figures.parameters,
        "flops_per_token": flops,
        "state_gib": round(figures.state_bytes / GIB, 4),
        "first_loss": figures.first_loss,
        "rounds_ms": [round(1000 * s, 4) for s in seconds],
    }


def _extrapolation(entries: Sequence[Entry], seconds: Mapping[str, float], full_layers: int) -> dict[str, Any]:
    slices = [Slice(layers=e.layers, step_ms=1000 * seconds[e.name]) for e in entries if e.variant.name == BASELINE]
    if len(slices) < 2:
        return {"failed": f"{BASELINE} did not run at two depths"}
    deep, shallow = max(slices, key=lambda s: s.layers), min(slices, key=lambda s: s.layers)
    step_ms = {e.name: 1000 * seconds[e.name] for e in entries if e.variant.name != BASELINE}
    try:
        return extrapolate(shallow, deep, full_layers=full_layers, step_ms=step_ms, baseline=BASELINE)
    except ValueError as error:
        return {"failed": str(error)}


def overheads(result: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    """Return what a variant takes over the baseline: time, time by round, peak memory; each "" for the baseline."""
    time, by_round, memory = (
        result[key].get(name)
        for key in ("overhead_percent", "overhead_percent_by_round", "peak_memory_overhead_percent")
    )
    return (
        "" if time is None else f"{time:+.2f} %",
        "" if by_round is None else "{median:+.2f} % ({min:+.1f} .. {max:+.1f})".format(**by_round),
        "" if memory is None else f"{memory:+.2f} %",
    )


def table(result: Mapping[str, Any]) -> Table:
    """Return what people look at of a result."""
    from rich.table import Table

    base = result["baseline"]
    caption = [f"{result['device']} x {result['ranks']}, torch {result['torch']}, {result['rounds']} rounds"]
    if result["device_type"] == "cpu":
        caption.append(f"a CPU's {result['clock']}: ratios at best, no measure of a GPU")
    shown = Table(title=f"{result['config']}: {result['tokens_per_step']:,} tokens a step")
    shown.add_column("variant", no_wrap=True)
    columns = ("step ms (min .. max)", "tokens/s", "MFU", "peak GiB", f"over {base}", "by round (min .. max)", "memory")
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    for name, values in result["variants"].items():
        mfu = values["mfu_percent"]
        shown.add_row(
            name,
            "{median:.1f} ({min:.1f} .. {max:.1f})".format(**values["step_ms"]),
            f"{values['tokens_per_second']:,.0f}",
            "n/a" if mfu is None else f"{mfu:.1f} %",
            f"{values['peak_memory_gib']:.3f}",
            *overheads(result, name),
        )
        caption += [f"{name}: {note}" for note in values["notes"]]
    caption += [f"{name} failed: {why}" for name, why in result.get("failed", {}).items()]
    extrapolation = result.get("extrapolation", {})
    caption += extrapolation.get("arithmetic", []) or filter(None, [extrapolation.get("failed")])
    shown.caption = "\n".join(caption)
    shown.caption_justify = "left"
    return shown
