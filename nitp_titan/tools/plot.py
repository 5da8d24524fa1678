"""Loss and geometry curves of runs: ``nitp-titan plot RUN_DIR... --out FILE.png``.

Reads what a run left in its folder (``tb/**/events.out.tfevents.*``, else ``metrics.jsonl``) and draws one panel per
metric, one colour per run. Free of torch: a plot does not wait for it. A new metric is one line of ``PANELS``.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nitp_titan.runs.origin import branched_from
from nitp_titan.runs.scalars import Scalars, read_scalars, run_names
from nitp_titan.runs.tags import (
    EFFECTIVE_RANK,
    MAX_LOAD,
    MEAN_COSINE,
    NITP,
    NTP,
    TOTAL,
    VALIDATION_NITP,
    VALIDATION_NTP,
    VALIDATION_TOTAL,
)


@dataclass(frozen=True)
class Panel:
    """One set of axes: a title and the tags it shows, of which a run's first present one is drawn."""

    title: str
    tags: tuple[str, ...]
    only_beside: str | None = None
    """Leave the panel out unless some run has this tag: without it, the panel would repeat another one."""


PANELS = (
    Panel("NTP loss", (NTP, TOTAL)),  # a stock TorchTitan run has its NTP loss as its total
    Panel("NITP loss", (NITP,)),
    Panel("Total loss", (TOTAL,), only_beside=NTP),
    Panel("Validation NTP loss", (VALIDATION_NTP, VALIDATION_TOTAL)),
    Panel("Validation NITP loss", (VALIDATION_NITP,)),
    Panel("Validation total loss", (VALIDATION_TOTAL,), only_beside=VALIDATION_NTP),
    Panel("Effective rank", (EFFECTIVE_RANK,)),
    Panel("Mean cosine similarity", (MEAN_COSINE,)),
    Panel("Largest expert load / mean", (MAX_LOAD,)),
    Panel("Throughput (tokens/s per device)", ("throughput(tps)",)),
)
SUFFIXES = (".png", ".pdf", ".svg")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, without yellow
LINE_STYLES = ("-", "--", "-.", ":")  # the next style for each further round of colours
MAX_DRAWN = 5000
"""Points of a series beyond which it is drawn as means over stretches of steps, within a band from min to max."""
NUM_STRETCHES = 1000
FEW_POINTS = 12
"""Points of a series up to which each one gets a small marker."""


def _shorten(name: str, limit: int = 60) -> str:
    if len(name) <= limit:
        return name
    return f"{name[: limit // 2 - 1]}…{name[-(limit // 2) :]}"


def plot_runs(run_dirs: list[Path], out: Path) -> None:
    """Draw the curves of one or several run folders into ``out`` (``.png``, ``.pdf`` or ``.svg``), all or nothing.

    Raises:
        ValueError: an unsupported suffix; a folder that does not exist, holds no metrics or none that is plotted
            (all such folders in one message); a place that cannot be written to.
    """
    out = Path(out)
    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{out}: suffix {suffix or '(none)'} is not supported; expected one of {', '.join(SUFFIXES)}")
    if not run_dirs:
        raise ValueError("no run folder to plot")
    unique = list({os.path.abspath(run_dir): Path(run_dir) for run_dir in run_dirs}.values())
    runs: list[Scalars] = []
    problems: list[str] = []
    for run_dir in unique:
        try:
            scalars = read_scalars(run_dir)
            _check_tags(run_dir, scalars)
            runs.append(scalars)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))

    origins = (branched_from(run_dir) for run_dir in unique)
    names = [f"{name}, from {of}" if of else name for name, of in zip(run_names(unique), origins, strict=True)]
    figure = build_figure(dict(zip(names, runs, strict=True)))
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(unfinished, format=suffix[1:], dpi=150)
        os.replace(unfinished, out)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        # The parent may not even be a folder; there is nothing to clean up then.
        if unfinished.parent.is_dir():
            unfinished.unlink(missing_ok=True)


def _check_tags(run_dir: Path, scalars: Scalars) -> None:
    known = {tag for panel in PANELS for tag in panel.tags}
    if known.isdisjoint(scalars):
        found = sorted(scalars)
        there = ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
        raise ValueError(f"{run_dir}: no metric that is plotted; its tags: {there or 'none yet'}")


def build_figure(runs: dict[str, Scalars]) -> Figure:
    """The figure of named runs: a panel for each metric that one of them has, titled as in ``PANELS``."""
    panels = [
        panel
        for panel in PANELS
        if any(tag in scalars for scalars in runs.values() for tag in panel.tags)
        and (panel.only_beside is None or any(panel.only_beside in scalars for scalars in runs.values()))
    ]
    num_columns = _num_columns(len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    width = 4.2 * max(num_columns, 1.4)  # a lone panel is wider than one of many
    handles = _legend_handles(list(runs))
    # Of a font of 9 points a character is about 0.075 inches wide; the handle and its gaps take about 0.7.
    legend_columns = int(width / (0.7 + 0.075 * max(len(handle.get_label()) for handle in handles)))
    legend_columns = min(max(legend_columns, 1), len(handles))
    header = 0.22 * math.ceil(len(handles) / legend_columns) + 0.3
    figure = Figure(figsize=(width, 2.75 * num_rows + header), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.02, hspace=0.05)

    grid = figure.subplots(num_rows, num_columns, sharex=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid.flat, panels, strict=False):
        for handle, scalars in zip(handles, runs.values(), strict=True):
            tag = next((tag for tag in panel.tags if tag in scalars), None)
            if tag is not None:
                _draw(axes, scalars[tag], handle)
        _style(axes, panel.title)
    drawn_steps = np.concatenate([line.get_xdata() for axes in figure.axes for line in axes.get_lines()])
    if np.ptp(drawn_steps) == 0:  # one step in all: whole numbers around it
        figure.axes[0].set_xlim(drawn_steps[0] - 1, drawn_steps[0] + 1)
    figure.supxlabel("step", fontsize=10, color="#333333")
    if len(runs) == 1:
        figure.suptitle(handles[0].get_label(), fontsize=11, fontweight="bold", color="#222222", parse_math=False)
    else:
        legend = figure.legend(
            handles=handles, loc="outside upper center", ncols=legend_columns, frameon=False, fontsize=9.5
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _num_columns(num_panels: int) -> int:
    """3 or 4 a row, whichever leaves fewer holes; up to 4 panels: a row, or two by two."""
    if num_panels <= 3:
        return max(num_panels, 1)
    if num_panels == 4:
        return 2
    return min((3, 4), key=lambda columns: (-num_panels % columns, -columns))


def _legend_handles(names: Sequence[str]) -> list[Line2D]:
    """A line for each run, which also says how the run is drawn."""
    return [
        Line2D(
            [],
            [],
            color=COLOURS[index % len(COLOURS)],
            linestyle=LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)],
            linewidth=2.0,
            label=_shorten(name),
        )
        for index, name in enumerate(names)
    ]


def _draw(axes: Axes, points: list[tuple[int, float]], handle: Line2D) -> None:
    steps = np.array([step for step, _ in points], dtype=np.float64)
    values = np.array([value for _, value in points], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan  # a gap in the line
    style: dict[str, Any] = {
        "color": handle.get_color(),
        "linestyle": handle.get_linestyle(),
        "label": handle.get_label(),
        "linewidth": 1.2,
        "solid_joinstyle": "round",
        "alpha": 0.9,
    }
    if len(points) > MAX_DRAWN:
        bounds = np.linspace(0, len(points), NUM_STRETCHES + 1).astype(int)
        stretches = [slice(start, end) for start, end in itertools.pairwise(bounds)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a stretch without a finite value is a gap
            low, mean, high = (
                np.array([reduce(values[stretch]) for stretch in stretches])
                for reduce in (np.nanmin, np.nanmean, np.nanmax)
            )
        steps = np.array([steps[stretch].mean() for stretch in stretches])
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
        values = mean
    elif np.isfinite(values).sum() <= 1:
        style |= {"marker": "o", "markersize": 5.5}
    elif len(points) <= FEW_POINTS:
        style |= {"marker": "o", "markersize": 3}
    axes.plot(steps, values, **style)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color="#222222", pad=6)
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color="#999999", linewidth=0.8)
    axes.tick_params(labelsize=8.5, labelbottom=True, color="#999999", labelcolor="#333333", length=3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick_label))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick_label))
    axes.margins(x=0.02, y=0.06)
    lines = axes.get_lines()
    if lines and all(np.isnan(np.asarray(line.get_ydata(), dtype=float)).all() for line in lines):
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center", color="#777777")
        axes.set_yticks([])


def _tick_label(value: float, _position: int | None = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / size:.6g}{letter}"
    return f"{value:.6g}"
