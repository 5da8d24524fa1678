"""The routed experts of a block alone, forward and backward, in turn: flavors x tokens, against their limits.

    python -m benchmarks.experts --device auto
    python -m benchmarks.experts --flavors 9B-A1B --tokens 32768

Rows go to experts at random, as an untrained router sends them: a few per cent more to one than to another.
"""

# Shape suffixes: R = routed rows (tokens x top_k), D = model dim, F = expert hidden dim, E = experts

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.console import at_least, measure, show
from benchmarks.measure import DeviceClock, Spread, take_turns_or_drop_out
from benchmarks.roofline import Operation, expert_operations, seconds_of
from nitp_titan.models.flavors import FLAVORS, Shape

if TYPE_CHECKING:
    import torch
    from rich.table import Table

_DEFAULTS = {
    "gpu": {"flavors": "1.9B-A0.3B,9B-A1B", "tokens": "8192,32768"},
    "cpu": {"flavors": "debug_moe", "tokens": "256,512"},
}
BASELINE = "ours"
PADDED_TO = 128
"""What "padded" rounds an expert's width up to: a tile of a product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One size."""

    flavor: str
    tokens: int
    device: str
    dtype: str

    @property
    def shape(self) -> Shape:
        return FLAVORS[self.flavor].shape

    @property
    def operations(self) -> list[Operation]:
        """What the experts do, forward and backward."""
        s = self.shape
        return expert_operations(s.dim, s.expert_hidden_dim, rows=self.tokens * s.top_k, experts=s.num_experts)


class Experts:
    """An implementation with its weights and rows; takes turns."""

    def __init__(self, module: torch.nn.Module, x_RD: torch.Tensor, counts_E: torch.Tensor, call: Any):
        self.module, self.x_RD, self.counts_E, self.call = module, x_RD, counts_E, call

    def run(self, steps: int) -> None:
        """Run forward and backward a number of times."""
        for _ in range(steps):
            self.release()
            self.call(self.x_RD, self.counts_E).backward(self.x_RD.detach())

    def release(self) -> None:
        """Drop the gradients."""
        self.module.zero_grad(set_to_none=True)
        self.x_RD.grad = None


def implementations(case: Case, *, compile: bool) -> dict[str, Experts]:
    """Return what is measured: ours, TorchTitan's, and ours with wider experts."""
    import torch
    from torchtitan.models.common.moe import GroupedExperts

    from nitp_titan.models.experts import DtypePreservingGroupedExperts

    shape, dtype = case.shape, getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    rows = case.tokens * shape.top_k
    chosen = torch.randint(shape.num_experts, (rows,), generator=generator)
    counts_E = torch.bincount(chosen, minlength=shape.num_experts).to(case.device)
    x_RD = torch.randn(rows, shape.dim, generator=generator).to(case.device, dtype)
    wider = -(-shape.expert_hidden_dim // PADDED_TO) * PADDED_TO
    kinds = {
        BASELINE: (DtypePreservingGroupedExperts, shape.expert_hidden_dim),
        "torchtitan": (GroupedExperts, shape.expert_hidden_dim),
    }
    if wider > shape.expert_hidden_dim:
        kinds[f"ours, width {wider}"] = DtypePreservingGroupedExperts, wider
    found = {}
    for name, (kind, hidden) in kinds.items():
        with torch.device(case.device):
            module = kind(kind.Config(dim=shape.dim, hidden_dim=hidden, num_experts=shape.num_experts)).to(dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.02)
        call = torch.compile(module, fullgraph=True) if compile else module
        found[name] = Experts(module, x_RD.clone().requires_grad_(), counts_E, call)
    return found


def run_case(case: Case, *, compile: bool, rounds: int, steps: int, peak: bool) -> dict[str, Any]:
    """Measure one case.

    Args:
        peak: whether the limits are an H100's, which ``limit_ms`` is then given for.
    """
    runners: dict[str, Any] = implementations(case, compile=compile)
    skipped: dict[str, str] = {}

    def skip(name: str, error: BaseException) -> None:
        runners.pop(name)
        skipped[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    for name, experts in list(runners.items()):
        try:
            experts.run(2)  # compiles
            experts.release()
        except Exception as error:  # the rest goes on
            skip(name, error)
    clock = DeviceClock(case.device)
    seconds = take_turns_or_drop_out(runners, skip, rounds=rounds, steps=steps, settle=1, clock=clock)
    work = sum(operation.flops for operation in case.operations)
    shape = case.shape
    sizes = {"flavor": case.flavor, "tokens": case.tokens, "rows": case.tokens * shape.top_k, "dtype": case.dtype}
    sizes |= {"experts": shape.num_experts, "width": shape.dim, "hidden": shape.expert_hidden_dim, "compile": compile}
    found = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        found[name] = {"ms": Spread.of(1e3 * s for s in values).to_json(), "tflops": round(work / median / 1e12, 2)}
    result = {**sizes, "gflops": round(work / 1e9, 2), "implementations": found, "skipped": skipped}
    if peak:
        result["limit_ms"] = round(1e3 * seconds_of(case.operations), 4)
    return result


def table(result: dict[str, Any]) -> Table:
    """Return what people look at of a result."""
    from rich.table import Table

    shown = Table(title="forward and backward of a block's routed experts")
    shown.add_column("experts", no_wrap=True)
    shown.add_column("implementation", no_wrap=True)
    for name in ("ms (min .. max)", "TFLOPS", "limit ms"):
        shown.add_column(name, justify="right", no_wrap=True)
    for case in result["experts"]:
        size = f"{case['flavor']}, {case['tokens']:,} tokens"
        for name, values in case["implementations"].items():
            times = "{median:.3f} ({min:.3f} .. {max:.3f})".format(**values["ms"])
            shown.add_row(size, name, times, f"{values['tflops']:.1f}", f"{case.get('limit_ms', '')}")
        for name, why in case["skipped"].items():
            shown.add_row(size, name, why[:60], "", "")
        shown.add_section()
    shown.caption = f"{result['device']}, torch {result['torch']}; useful FLOPs: those of the flavor's own width"
    shown.caption_justify = "left"
    return shown


def cases(options: argparse.Namespace, device: str) -> list[Case]:
    """Return the cases.

    Raises:
        ValueError: a flavor without experts, or tokens that are no number of at least 1.
    """
    defaults = _DEFAULTS["cpu" if device == "cpu" else "gpu"]
    flavors = (options.flavors or defaults["flavors"]).split(",")
    known = [name for name, flavor in FLAVORS.items() if flavor.shape.num_experts]
    if unknown := [name for name in flavors if name not in known]:
        raise ValueError(f"--flavors: found {unknown[0]!r}, expected some of {', '.join(known)}")
    words = (options.tokens or defaults["tokens"]).split(",")
    if wrong := [word for word in words if not word.strip().isdecimal() or int(word) < 1]:
        raise ValueError(f"--tokens: found {wrong[0]!r}, expected whole numbers of at least 1, with commas")
    dtype = "float32" if device == "cpu" else "bfloat16"
    return [Case(flavor=f, tokens=int(t), device=device, dtype=dtype) for f in flavors for t in words]


def run(options: argparse.Namespace) -> int:
    """Run the benchmark; return the exit code."""
    from nitp_titan.runtime import prepare

    prepare()
    from torchtitan.tools import utils

    device = utils.device_type
    asked = cases(options, device)
    facts = results.machine_facts()
    out = options.out or results.default_path("experts", "", facts["device"], device)
    results.check_writable(out)
    compile = device != "cpu" if options.compile is None else options.compile
    result: dict[str, Any] = {**facts, "rounds": options.repeats, "clock": DeviceClock(device).kind, "experts": []}
    for case in asked:
        print(f"{case.flavor}: {case.tokens:,} tokens", file=sys.stderr, flush=True)
        found = run_case(case, compile=compile, rounds=options.repeats, steps=options.steps, peak=device != "cpu")
        result["experts"].append(found)
        results.write(out, result)
    show(table(result), out)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; those that are not given depend on the device and stay None."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu, cpu = _DEFAULTS["gpu"], _DEFAULTS["cpu"]
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--flavors", help=f"with commas ({gpu['flavors']}; on a CPU {cpu['flavors']})")
    parser.add_argument("--tokens", help=f"with commas ({gpu['tokens']}; on a CPU {cpu['tokens']})")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(on a GPU)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed calls of a turn (%(default)s)")
    parser.add_argument("--verbose", action="store_true", help="logs")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (benchmarks/results/DEVICE/experts.json)")
    options = parser.parse_args(arguments)
    at_least(parser, options, repeats=1, steps=1)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a wrong option."""
    return measure(run, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
