"""Flex attention alone, forward and backward, with the tiles that ``[model.flex_kernel_options]`` can set, in turn.

    python -m benchmarks.attention --device auto
    python -m benchmarks.attention --flavors 0.5B --mean-document 0        # sequences of one document
    python -m benchmarks.attention --fastest FILE --flavors 0.5B           # a measured file's, as a variant's overrides

Several processes compile; then they time one after the other, so that a GPU is one candidate's alone.
"""

# Shape suffixes: B = sequences, N = query heads, K = key heads, G = query heads of a key head, L = tokens, H = head dim

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.console import at_least, measure, show
from benchmarks.measure import DeviceClock, Spread
from benchmarks.tiles import NAMES, TORCHS, Direction, candidates
from nitp_titan.models.flavors import FLAVORS, Shape

if TYPE_CHECKING:
    import torch
    from rich.table import Table

WRONG = 0.03
"""Relative error from which a candidate is not taken: bf16's own is below 0.01."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One size: a flavor's heads, and documents."""

    flavor: str
    sequences: int
    seq_len: int
    mean_document: int
    device: str
    compile: bool

    @property
    def shape(self) -> Shape:
        return FLAVORS[self.flavor].shape

    @property
    def has_backward(self) -> bool:
        """Flex attention has no backward pass on a CPU."""
        return self.device != "cpu"


class Attention:
    """Flex attention of one case with one candidate's options, and what it is compared with."""

    def __init__(self, case: Case):
        import torch
        import torch._functorch.config
        from torch.nn.attention.flex_attention import create_block_mask

        from benchmarks.batches import packed_batch

        # A backward pass is run many times here, so it may not give its inputs' memory to its results.
        torch._functorch.config.donated_buffer = False
        self.case, shape, device = case, case.shape, case.device
        generator = torch.Generator().manual_seed(0)
        sizes = {"sequences": case.sequences, "seq_len": case.seq_len, "vocab_size": 2}
        inputs, _ = packed_batch(generator, **sizes, mean_document=case.mean_document)
        document_BL = (inputs["positions"] == 0).cumsum(dim=1).to(device)

        def causal_in_document(b: Any, _head: Any, q: Any, kv: Any) -> Any:
            return (q >= kv) & (document_BL[b, q] == document_BL[b, kv])

        self.mask = create_block_mask(causal_in_document, case.sequences, None, case.seq_len, case.seq_len, device)
        dtype = torch.bfloat16 if device != "cpu" else torch.float32

        def draw(heads: int) -> torch.Tensor:
            drawn = torch.randn(case.sequences, heads, case.seq_len, shape.head_dim, generator=generator)
            return drawn.to(device, dtype).requires_grad_(case.has_backward)

        self.q_BNLH, self.k_BKLH, self.v_BKLH = draw(shape.n_heads), draw(shape.n_kv_heads), draw(shape.n_kv_heads)
        self.gradient_BNLH = draw(shape.n_heads).detach()
        self.document_L = document_BL[0]

    def call(self, options: dict[str, int]) -> Any:
        """Return a function that runs the forward pass with these options."""
        import torch
        from torch.nn.attention.flex_attention import flex_attention

        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True) if self.case.compile else flex_attention
        kernel_options: Any = options or None
        return lambda: attend(
            self.q_BNLH,
            self.k_BKLH,
            self.v_BKLH,
            block_mask=self.mask,
            enable_gqa=True,
            kernel_options=kernel_options,
        )

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.q_BNLH, self.k_BKLH, self.v_BKLH

    def reference(self) -> list[torch.Tensor]:
        """Return output and gradients of the first sequence's first key head, by dense attention in fp32."""
        import torch

        group = self.case.shape.n_heads // self.case.shape.n_kv_heads
        q_GLH, k_LH, v_LH = (
            x.detach().float().requires_grad_() for x in (self.q_BNLH[0, :group], self.k_BKLH[0, 0], self.v_BKLH[0, 0])
        )
        document_L = self.document_L
        allowed_LL = (document_L[:, None] == document_L[None, :]).tril()
        out_GLH = torch.nn.functional.scaled_dot_product_attention(
            q_GLH[None], k_LH.expand(1, group, -1, -1), v_LH.expand(1, group, -1, -1), attn_mask=allowed_LL
        )[0]
        out_GLH.backward(self.gradient_BNLH[0, :group].float())
        gradients = (x.grad for x in (q_GLH, k_LH, v_LH))
        return [out_GLH.detach(), *(gradient for gradient in gradients if gradient is not None)]

    def error(self, options: dict[str, int], expected: list[torch.Tensor]) -> float:
        """Return the largest relative error of output and gradients."""
        import torch

        group = self.case.shape.n_heads // self.case.shape.n_kv_heads
        out_BNLH = self.call(options)()
        found = [out_BNLH.detach()[0, :group]]
        if self.case.has_backward:
            q_BNLH, k_BKLH, v_BKLH = torch.autograd.grad(out_BNLH, self.inputs, self.gradient_BNLH)
            found += [q_BNLH[0, :group], k_BKLH[0, 0], v_BKLH[0, 0]]
        errors = [(f.float() - e).norm() / e.norm() for f, e in zip(found, expected, strict=False)]
        return max(float(error) for error in errors)

    def seconds(self, direction: Direction, options: dict[str, int], *, rounds: int, steps: int) -> list[float]:
        """Return the seconds a call of every round."""
        import torch

        forward = self.call(options)
        clock = DeviceClock(self.case.device)
        out_BNLH = forward()

        def backward() -> None:
            torch.autograd.grad(out_BNLH, self.inputs, self.gradient_BNLH, retain_graph=True)

        run = forward if direction == "forward" else backward
        found = []
        for _ in range(rounds):
            run()
            begin = clock()
            for _ in range(steps):
                run()
            found.append((clock() - begin) / steps)
        return found


def _directions(case: Case) -> tuple[Direction, ...]:
    return ("forward", "backward") if case.has_backward else ("forward",)


Work = tuple[Direction, str, dict[str, int]]


def _work(case: Case) -> Iterator[Work]:
    for direction in _directions(case):
        for name, options in candidates(direction, case.shape.head_dim).items():
            yield direction, name, options


def _worker(case: Case, share: list[Work], compiled: Any, alone: Any, queue: Any, rounds: int, steps: int) -> None:
    """Compile a share of the work, wait for the others, and time it."""
    ready: list[tuple[Work, float]] = []
    try:
        attention = Attention(case)
        expected = attention.reference()
        for work in share:
            try:
                ready.append((work, attention.error(work[2], expected)))
            except Exception as error:  # most of all: it takes more shared memory than there is
                queue.put((work, None, _said(error)))
    finally:
        compiled.wait()
    for work, error in ready:
        try:
            with alone:
                seconds = attention.seconds(work[0], work[2], rounds=rounds, steps=steps)
            queue.put((work, seconds, error))
        except Exception as failure:
            queue.put((work, None, _said(failure)))
    queue.put(None)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def run_case(case: Case, *, workers: int, rounds: int, steps: int) -> dict[str, Any]:
    """Measure a case in several processes."""
    work = list(_work(case))
    workers = min(workers, len(work))
    context = multiprocessing.get_context("spawn")
    compiled, alone, queue = context.Barrier(workers), context.Lock(), context.Queue()
    shares = [work[i::workers] for i in range(workers)]
    processes = [
        context.Process(target=_worker, args=(case, share, compiled, alone, queue, rounds, steps)) for share in shares
    ]
    for process in processes:
        process.start()
    found: Found = {}
    ended = 0
    while ended < workers:
        try:
            message = queue.get(timeout=5)
        except Exception:  # Empty: is anybody left who could say something?
            if any(process.exitcode for process in processes):
                compiled.abort()  # nobody waits for the one that ended
            if not any(process.is_alive() for process in processes):
                break
            continue
        if message is None:
            ended += 1
            continue
        (direction, name, _options), seconds, note = message
        found[direction, name] = seconds, note
        text = note if seconds is None else f"{1e3 * statistics.median(seconds):.3f} ms"
        print(f"{case.flavor} {direction} {name}: {text}", file=sys.stderr, flush=True)
    for process in processes:
        process.join()
    return _result(case, found)


Found = dict[tuple[Direction, str], tuple[list[float] | None, Any]]
"""(direction, candidate) -> the seconds of its rounds and its error, or None and why there are none."""


def _result(case: Case, found: Found) -> dict[str, Any]:
    shape = case.shape
    result: dict[str, Any] = {**dataclasses.asdict(case), "heads": shape.n_heads, "key_heads": shape.n_kv_heads}
    result |= {"head_dim": shape.head_dim, "fastest": {}, "skipped": {}}
    for direction in _directions(case):
        rows = result[direction] = {}
        for name, options in candidates(direction, shape.head_dim).items():
            seconds, note = found.get((direction, name), (None, "its process ended"))
            if seconds is None:
                result["skipped"][f"{direction} {name}"] = note
                continue
            rows[name] = {"options": options, "ms": Spread.of(1e3 * s for s in seconds).to_json(), "error": note}
        right = {name: row for name, row in rows.items() if row["error"] < WRONG}
        if right:
            best = min(right.values(), key=lambda row: row["ms"]["median"])
            result["fastest"] |= best["options"]
    return result


def fastest(path: Path, flavor: str) -> str:
    """Return a measured flavor's fastest tiles as a variant's overrides, ``model.flex_kernel_options.X=Y,...``.

    Raises:
        ValueError: the file has no such flavor.
    """
    for case in json.loads(path.read_text())["attention"]:
        if case["flavor"] == flavor:
            return ",".join(f"model.flex_kernel_options.{name}={value}" for name, value in case["fastest"].items())
    raise ValueError(f"--flavors: found {flavor!r}, which {path} does not have")


def table(result: dict[str, Any]) -> Table:
    """Return what people look at of a result."""
    from rich.table import Table

    shown = Table(title="flex attention with a mask of documents")
    for name in ("attention", "tiles, warps, stages"):
        shown.add_column(name, no_wrap=True)
    for name in ("ms (min .. max)", "in torch's", "error"):
        shown.add_column(name, justify="right", no_wrap=True)
    for case in result["attention"]:
        for direction in NAMES:
            rows = case.get(direction, {})
            base = rows.get(TORCHS, {}).get("ms", {}).get("median")
            for name, row in sorted(rows.items(), key=lambda item: item[1]["ms"]["median"]):
                times = "{median:.3f} ({min:.3f} .. {max:.3f})".format(**row["ms"])
                ratio = f"{row['ms']['median'] / base:.2f}" if base else ""
                shown.add_row(f"{case['flavor']}, {direction}", name, times, ratio, f"{row['error']:.4f}")
            shown.add_section()
    shown.caption = f"{result['device']}, torch {result['torch']}"
    shown.caption_justify = "left"
    return shown


def _cases(options: argparse.Namespace, device: str) -> list[Case]:
    flavors = options.flavors.split(",")
    if unknown := [name for name in flavors if name not in FLAVORS]:
        raise ValueError(f"--flavors: found {unknown[0]!r}, expected some of {', '.join(FLAVORS)}")
    sizes = {"sequences": options.sequences, "seq_len": options.seq_len, "mean_document": options.mean_document}
    return [Case(flavor=name, **sizes, device=device, compile=device != "cpu") for name in flavors]


def run(options: argparse.Namespace) -> int:
    """Run the benchmark; return the exit code."""
    if options.fastest:
        print(fastest(options.fastest, options.flavors))
        return 0
    from nitp_titan.runtime import prepare

    prepare()
    from torchtitan.tools import utils

    device = utils.device_type
    asked = _cases(options, device)
    facts = results.machine_facts()
    out = options.out or results.default_path("attention", "", facts["device"], device)
    results.check_writable(out)
    result = {**facts, "rounds": options.repeats, "clock": DeviceClock(device).kind, "attention": []}
    for case in asked:
        found = run_case(case, workers=options.workers, rounds=options.repeats, steps=options.steps)
        result["attention"].append(found)
        results.write(out, result)
    show(table(result), out)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--flavors", default="0.5B", help="with commas (%(default)s)")
    parser.add_argument("--sequences", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--seq-len", type=int, default=8192, help="(%(default)s)")
    parser.add_argument("--mean-document", type=int, default=1024, help="tokens, 0 = whole sequences (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed calls of a round (%(default)s)")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument("--fastest", type=Path, default=None, metavar="FILE", help="print, measure nothing")
    parser.add_argument("--verbose", action="store_true", help="logs")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (benchmarks/results/DEVICE/attention.json)")
    options = parser.parse_args(arguments)
    at_least(parser, options, repeats=1, steps=1, workers=1, sequences=1, seq_len=1, mean_document=0)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a wrong option."""
    return measure(run, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
