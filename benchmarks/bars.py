"""The figures that NITP's cost is to reach, and where the results of a GPU say whether it does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.variants import BASELINE

UNMEASURED = "unmeasured"
Result = Mapping[str, Any]

_KINDS = {"cpu": "cpu", "meta": "meta"}


@dataclass(frozen=True)
class Results:
    """The results of GPUs, those of CPUs, or what was counted without a device."""

    throughput: list[Result]
    loss: list[Result]
    experts: list[Result] = field(default_factory=list)
    attention: list[Result] = field(default_factory=list)
    card: str = "H100"
    """Of which GPU bars are looked at."""

    @classmethod
    def read(cls, folder: Path, kind: Literal["gpu", "cpu", "meta"]) -> Results:
        """Read every result of a kind in a folder's folders, one for each device, in order of their paths.

        Raises:
            ValueError: a file is not a JSON object; the message names it.
        """
        found = [_read(path) for path in sorted(folder.glob("*/*.json"))]
        found = [result for result in found if _KINDS.get(result.get("device_type"), "gpu") == kind]
        kinds = ("variants", "cases", "experts", "attention")
        return cls(*([result for result in found if key in result] for key in kinds))

    def of_bars(self, config: str, *paths: tuple[str, ...], whole: bool = True) -> list[Result]:
        """Return the throughput results that bars speak of, and that have all of these values.

        Only one GPU counts, a job as its file has it but for the batch and what is recomputed, and overheads over
        next-token prediction as it is without NITP, not over other variants.

        Args:
            config: the file's name without its ending.
            paths: of keys.
            whole: of the whole model, not of slices.
        """
        return [
            result
            for result in self.throughput
            if Path(result["config"]).stem == config
            and ("extrapolation" not in result) == whole
            and self._on_one_card(result)
            and not _changed(result)
            and all(at(result, *path) is not None for path in paths)
            and (result["baseline"] == BASELINE or not any("overhead_percent" in path[0] for path in paths))
        ]

    def longest(self, config: str, *paths: tuple[str, ...], whole: bool = True) -> Result | None:
        """Return the one of :meth:`of_bars` with most rounds."""
        return max(self.of_bars(config, *paths, whole=whole), key=lambda result: result["rounds"], default=None)

    def of(self, config: str, *path: str, whole: bool = True) -> Any:
        """Return a value of :meth:`longest`'s result; None where there is none."""
        return at(self.longest(config, path, whole=whole), *path)

    def most(self, config: str, *path: str) -> float | None:
        """Return the largest value of :meth:`of_bars`; None where there is none."""
        return max((at(result, *path) for result in self.of_bars(config, path)), default=None)

    def nitp_of_loss(self, tokens: int, key: str) -> float | None:
        """Return the largest of what NITP adds to a compiled bf16 loss of this many tokens on one GPU."""
        wanted = {"tokens": tokens, "dtype": "bfloat16", "compile": True}
        cases = [case for result in self.loss if self._on_one_card(result) for case in result["cases"]]
        found = [case["nitp"][key] for case in cases if "nitp" in case and wanted.items() <= case.items()]
        return max(found, default=None)

    def _on_one_card(self, result: Result) -> bool:
        return self.card in result["device"] and result["ranks"] == 1


_THE_SAME_WORK = {"--training.local_batch_size", "--training.global_batch_size", "--activation_checkpoint.mode"}


def _changed(result: Result) -> bool:
    """Whether the command line changed more of the job than its batch and what is recomputed."""
    options = (word.partition("=")[0] for word in result["job_overrides"] if word.startswith("--"))
    return not _THE_SAME_WORK.issuperset(options)


def _read(path: Path) -> Result:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a result, which is a JSON object")
    return found


def at(value: Any, *path: str) -> Any:
    """Return what lies at the end of a path of keys; None where there is nothing."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


CARDS = ("H100", "H200")
"""What bars are looked at on. They are set for an H100; an H200 is its chip with 1.4 times the bandwidth of memory."""


@dataclass(frozen=True)
class Bar:
    """What a figure is to reach on one GPU (bf16, compiled, context 8192)."""

    what: str
    unit: str
    """How a figure of it is written."""
    must: float
    value: Callable[[Results], float | None]
    beyond: float | None = None
    """What would be better still."""
    at_least: bool = False
    """Whether more is better."""

    def row(self, results: Results) -> str:
        """Return its row of the table: a figure that nobody has measured is neither met nor missed."""
        sign = "at least" if self.at_least else "at most"
        must = f"{sign} {self._written(self.must)}"
        beyond = "" if self.beyond is None else self._written(self.beyond)
        found = " | ".join(self._found(self.value(replace(results, card=card))) for card in CARDS)
        return f"| {self.what} | {must} | {beyond} | {found} |"

    def _written(self, value: float) -> str:
        return self.unit.format(value).removeprefix("+")

    def _found(self, value: float | None) -> str:
        if value is None:
            return UNMEASURED
        reached = [name for name, bar in (("beyond", self.beyond), ("met", self.must)) if self._reaches(value, bar)]
        return f"{self.unit.format(value)}, {reached[0] if reached else 'missed'}"

    def _reaches(self, value: float, bar: float | None) -> bool:
        return bar is not None and (value >= bar if self.at_least else value <= bar)


SMALL, SPARSE, LARGE = "nitp_0.5b", "nitp_1.9b-a0.3b", "nitp_9b-a1b"
SPEED = ("variants", "nitp", "tokens_per_second")
BARS = (
    Bar("0.5B: tokens/s with NITP", "{:,.0f}", 100_000, lambda r: r.most(SMALL, *SPEED), 110_000, at_least=True),
    Bar("1.9B-A0.3B: tokens/s with NITP", "{:,.0f}", 75_000, lambda r: r.most(SPARSE, *SPEED), 100_000, at_least=True),
    Bar("0.5B: NITP's time over NTP's", "{:+.2f} %", 1.2, lambda r: r.of(SMALL, "overhead_percent", "nitp"), 0.9),
    Bar(
        "9B-A1B, from slices: NITP's time over NTP's",
        "{:+.2f} %",
        0.8,
        lambda r: r.of(LARGE, "extrapolation", "overhead_percent", "nitp", whole=False),
        0.5,
    ),
    Bar("0.5B: NITP's overhead in MTP-1's", "{:.3f}", 0.1, lambda r: r.of(SMALL, "nitp_share_of_mtp_overhead"), 0.05),
    Bar(
        "0.5B: our NTP's speed in stock TorchTitan's",
        "{:.3f}",
        1,
        lambda r: r.of(SMALL, "speed_over", "ntp", "stock"),
        1.15,
        at_least=True,
    ),
    Bar(
        "loss of 8,192 tokens: NITP's time over cross-entropy alone",
        "{:+.1f} %",
        15,
        lambda r: r.nitp_of_loss(8192, "time_overhead_percent"),
        10,
    ),
    Bar(
        "loss of 8,192 tokens: NITP's peak above cross-entropy alone",
        "{:+.1f} MiB",
        64,
        lambda r: r.nitp_of_loss(8192, "peak_above_cross_entropy_mib"),
    ),
    Bar(
        "0.5B: NITP's peak memory over NTP's",
        "{:+.2f} %",
        3,
        lambda r: r.of(SMALL, "peak_memory_overhead_percent", "nitp"),
    ),
    Bar(
        "0.5B: speed of float8 in bf16's, with NITP",
        "{:.3f}",
        1,
        lambda r: r.of(SMALL, "speed_over", "nitp_float8", "nitp"),
        at_least=True,
    ),
)
