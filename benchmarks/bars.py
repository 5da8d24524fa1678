"""The figures that NITP's cost is to reach, and where the results of a GPU say whether it does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

UNMEASURED = "unmeasured"
Result = Mapping[str, Any]

_KINDS = {"cpu": "cpu", "meta": "meta"}


@dataclass(frozen=True)
class Results:
    """The results of GPUs, those of CPUs, or what was counted without a device."""

    throughput: list[Result]
    loss: list[Result]

    @classmethod
    def read(cls, folder: Path, kind: Literal["gpu", "cpu", "meta"]) -> Results:
        """Read every result of a kind in a folder's folders, one for each device, in order of their paths.

        Raises:
            ValueError: a file is not a JSON object; the message names it.
        """
        found = [_read(path) for path in sorted(folder.glob("*/*.json"))]
        found = [result for result in found if _KINDS.get(result.get("device_type"), "gpu") == kind]
        return cls([r for r in found if "variants" in r], [r for r in found if "cases" in r])

    def longest(self, config: str, *paths: tuple[str, ...], whole: bool = True) -> Result | None:
        """Return the throughput result that bars speak of: the one of most rounds that has all of these values.

        Only one H100 counts, and a job as its file has it but for the batch and what is recomputed.

        Args:
            config: the file's name without its ending.
            paths: of keys.
            whole: of the whole model, not of slices.
        """
        found = [
            result
            for result in self.throughput
            if Path(result["config"]).stem == config
            and ("extrapolation" not in result) == whole
            and _on_one_h100(result)
            and not _changed(result)
            and all(at(result, *path) is not None for path in paths)
        ]
        return max(found, key=lambda result: result["rounds"], default=None)

    def of(self, config: str, *path: str, whole: bool = True) -> Any:
        """Return a value of :meth:`longest`'s result; None where there is none."""
        return at(self.longest(config, path, whole=whole), *path)

    def nitp_of_loss(self, tokens: int, key: str) -> float | None:
        """Return the largest of what NITP adds to a compiled bf16 loss of this many tokens on one H100."""
        wanted = {"tokens": tokens, "dtype": "bfloat16", "compile": True}
        cases = [case for result in self.loss if _on_one_h100(result) for case in result["cases"]]
        found = [case["nitp"][key] for case in cases if "nitp" in case and wanted.items() <= case.items()]
        return max(found, default=None)


_THE_SAME_WORK = {"--training.local_batch_size", "--training.global_batch_size", "--activation_checkpoint.mode"}


def _on_one_h100(result: Result) -> bool:
    return "H100" in result["device"] and result["ranks"] == 1


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


@dataclass(frozen=True)
class Bar:
    """What a figure is to reach on one H100 (bf16, compiled, context 8192)."""

    what: str
    target: str
    form: str
    value: Callable[[Results], float | None]
    met: Callable[[float], bool]

    def row(self, results: Results) -> str:
        """Return its row of the table: a figure that nobody has measured is neither met nor missed."""
        value = self.value(results)
        if value is None:
            return f"| {self.what} | {self.target} | {UNMEASURED} | |"
        return f"| {self.what} | {self.target} | {self.form.format(value)} | {'met' if self.met(value) else 'missed'} |"


SMALL, LARGE = "nitp_0.5b", "nitp_9b-a1b"
BARS = (
    Bar(
        "0.5B: NITP's time over NTP's",
        "at most 1.2 %",
        "{:+.2f} %",
        lambda r: r.of(SMALL, "overhead_percent", "nitp"),
        lambda x: x <= 1.2,
    ),
    Bar(
        "0.5B: tokens/s with NITP",
        "at least 80,000",
        "{:,.0f}",
        lambda r: r.of(SMALL, "variants", "nitp", "tokens_per_second"),
        lambda x: x >= 80_000,
    ),
    Bar(
        "0.5B: NITP's peak memory over NTP's",
        "at most 3 %",
        "{:+.2f} %",
        lambda r: r.of(SMALL, "peak_memory_overhead_percent", "nitp"),
        lambda x: x <= 3,
    ),
    Bar(
        "0.5B: our NTP's speed in stock TorchTitan's",
        "at least 1.00",
        "{:.3f}",
        lambda r: r.of(SMALL, "speed_over", "ntp", "stock"),
        lambda x: x >= 1,
    ),
    Bar(
        "0.5B: NITP's overhead in MTP-1's",
        "at most 0.1",
        "{:.3f}",
        lambda r: r.of(SMALL, "nitp_share_of_mtp_overhead"),
        lambda x: x <= 0.1,
    ),
    Bar(
        "9B-A1B, from slices: NITP's time over NTP's",
        "at most 0.8 %",
        "{:+.2f} %",
        lambda r: r.of(LARGE, "extrapolation", "overhead_percent", "nitp", whole=False),
        lambda x: x <= 0.8,
    ),
    Bar(
        "0.5B: speed of float8 in bf16's, with NITP",
        "above 1.00 where the filter converts",
        "{:.3f}",
        lambda r: r.of(SMALL, "speed_over", "nitp_float8", "nitp"),
        lambda x: x > 1,
    ),
    Bar(
        "loss of 8,192 tokens: NITP's time over cross-entropy alone",
        "at most 15 %",
        "{:+.1f} %",
        lambda r: r.nitp_of_loss(8192, "time_overhead_percent"),
        lambda x: x <= 15,
    ),
    Bar(
        "loss of 8,192 tokens: NITP's peak above cross-entropy alone",
        "at most 64 MiB",
        "{:+.1f} MiB",
        lambda r: r.nitp_of_loss(8192, "peak_above_cross_entropy_mib"),
        lambda x: x <= 64,
    ),
)
