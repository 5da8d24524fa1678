"""What NITP's work costs at best: each of its operations at a GPU's peak of FLOPs or of memory bandwidth.

    python -m benchmarks.roofline [--flavor 0.5B --sequences 4 --ngpu 1]

An operation takes at least the longer of its FLOPs over the peak and its bytes over the bandwidth; nothing overlaps, so
that the sum is what separate kernels at their limits would take. Bytes are those of reading every operand and writing
every result once, between kernels that fuse what is elementwise. What is counted is training's: forward and backward of
projector and loss without recomputation, once a token; its weights' cast, reduction and optimizer, once a step.
"""

# t = tokens, d = model dim

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nitp_titan.models.costs import flops, nitp_flops, parts_of_shape
from nitp_titan.models.flavors import CONTEXT, FLAVORS
from nitp_titan.nitp.config import CHUNK_TOKENS, NITPConfig, projector_params

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """The limits of a device."""

    name: str
    flops: float
    """Dense bf16 products a second."""
    bandwidth: float
    """Bytes a second of its memory."""
    source: str


H100 = Accelerator(
    name="H100 SXM",
    flops=989.4e12,
    bandwidth=3.35e12,
    source="NVIDIA H100 Tensor Core GPU datasheet: 1,979 TFLOPS bf16 with sparsity, half of it dense; 3.35 TB/s",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """Some kernels, and what they must do."""

    name: str
    flops: float
    bytes: float

    def seconds(self, device: Accelerator) -> float:
        """Return the time at the device's limits."""
        return max(self.flops / device.flops, self.bytes / device.bandwidth)

    def limit(self, device: Accelerator) -> str:
        """Name the limit."""
        return "FLOPs" if self.flops / device.flops > self.bytes / device.bandwidth else "bytes"


Work = tuple[float, float]
"""FLOPs and bytes."""


def _product(rows: int, read: int, written: int, *, chunks: int = 1) -> Work:
    """Of (rows, read) x (read, written), or of a gradient that takes as many, in bf16, in chunks of rows."""
    return 2 * rows * read * written, 2 * (rows * (read + written) + chunks * read * written)


def _moved(numbers: float) -> Work:
    """Of elementwise work that reads and writes so many numbers in bf16."""
    return 0, 2 * numbers


def _operation(name: str, *work: Work) -> Operation:
    return Operation(name=name, flops=sum(w[0] for w in work), bytes=sum(w[1] for w in work))


def loss_operations(dim: int, tokens: int, *, ratio: int = 4) -> list[Operation]:
    """Return the forward and backward pass of NITP's term, in bf16: cosine loss, SwiGLU projector.

    Their FLOPs add up to ``costs.nitp_flops`` for each token.

    Args:
        ratio: ``nitp.projector_ratio``.
    """
    d, t, inner = dim, tokens, ratio * dim
    return [
        _operation("gate and up, forward", _product(t, d, 2 * inner)),
        _operation("SwiGLU, forward", _moved(t * 3 * inner)),
        _operation("down, forward", _product(t, inner, d)),
        # Both vectors read for the cosine, and again for its gradient, which is written.
        _operation("cosine, forward and backward", (18 * d * t, 2 * t * 5 * d)),
        _operation("down, backward", _product(t, d, inner), _product(t, inner, d)),
        _operation("SwiGLU, backward", _moved(t * 5 * inner)),
        _operation("gate and up, backward", _product(t, 2 * inner, d), _product(t, 2 * inner, d)),
        _operation("sum of the gradients of h", _moved(t * 3 * d)),
    ]


def nitp_operations(dim: int, tokens: int, *, ratio: int = 4, ranks: int = 1) -> list[Operation]:
    """Return what NITP adds to a step of a rank: :func:`loss_operations`, and its fp32 weights' work with AdamW.

    Args:
        tokens: of a rank's step.
        ratio: ``nitp.projector_ratio``.
        ranks: that share the weights (FSDP).
    """
    weights = 3 * ratio * dim**2
    # fp32 -> bf16 and back, whole on every rank; 7 fp32 numbers of each weight of the rank's own.
    own = _operation("weights: cast, gradients, AdamW", (0, weights * (6 + 6) + weights / ranks * 28))
    return [*loss_operations(dim, tokens, ratio=ratio), own]


def cross_entropy_operations(
    dim: int, tokens: int, vocabulary: int, *, chunk_tokens: int = CHUNK_TOKENS
) -> list[Operation]:
    """Return the forward and backward pass of an unembedding's cross-entropy, in bf16, logits in memory once.

    Args:
        chunk_tokens: whose logits exist at a time.
    """
    chunks, weights = math.ceil(tokens / chunk_tokens), vocabulary * dim
    product, moved = _product(tokens, vocabulary, dim, chunks=0)
    # In bf16 if there is one chunk. Else a sum in fp32, to which all products but the first add, and which is rounded.
    moved += 2 * weights if chunks == 1 else 4 * weights * (chunks + (chunks - 1)) + (4 + 2) * weights
    return [
        _operation("logits", _product(tokens, dim, vocabulary, chunks=chunks)),
        # Read for the maximum and the sum, and again for the gradient, which is written.
        _operation("softmax, forward and backward", _moved(3 * tokens * vocabulary)),
        _operation("gradient of h", _product(tokens, vocabulary, dim, chunks=chunks)),
        _operation("gradient of the weight", (product, moved)),
    ]


def expert_operations(dim: int, hidden: int, *, rows: int, experts: int) -> list[Operation]:
    """Return the forward and backward pass of routed experts (SwiGLU), in bf16, without routing and dispatch.

    Args:
        rows: tokens times the experts that each goes to.
        experts: whose weights are read, and whose gradients written, each once for a product.
    """
    weights = experts * dim * hidden

    def product(read: int, written: int) -> Work:
        return 2 * rows * read * written, 2 * (rows * (read + written) + weights)

    inward, outward = product(dim, hidden), product(hidden, dim)
    return [
        _operation("gate and up, forward", inward, inward),
        _operation("SwiGLU, forward", _moved(rows * 3 * hidden)),
        _operation("down, forward", outward),
        _operation("down, backward", outward, outward),
        _operation("SwiGLU, backward", _moved(rows * 5 * hidden)),
        _operation("gate and up, backward", inward, inward, inward, inward),
        _operation("sum of the gradients of x", _moved(rows * 3 * dim)),
    ]


def seconds_of(operations: Sequence[Operation], device: Accelerator = H100) -> float:
    """Return the time of operations one after the other, each at the device's limits."""
    return sum(operation.seconds(device) for operation in operations)


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """NITP's work beside the rest of a step."""

    flavor: str
    tokens: int
    operations: list[Operation]
    step_flops: float
    """Of next-token prediction alone, attention included."""
    device: Accelerator

    @property
    def nitp_seconds(self) -> float:
        return seconds_of(self.operations, self.device)

    @property
    def nitp_flops(self) -> float:
        return sum(operation.flops for operation in self.operations)

    @property
    def nitp_bytes(self) -> float:
        return sum(operation.bytes for operation in self.operations)

    def step_seconds(self, mfu: float) -> float:
        """Return the time of a step without NITP that runs at this share of the peak."""
        return self.step_flops / self.device.flops / mfu

    def overhead_percent(self, mfu: float) -> float:
        """Return NITP's time at its limits over a step at this share of the peak."""
        return 100 * self.nitp_seconds / self.step_seconds(mfu)


def roofline(flavor: str, *, sequences: int, ranks: int = 1, device: Accelerator = H100) -> Roofline:
    """Return the roofline of a flavor with its default ``[nitp]`` at its context.

    Args:
        sequences: of a rank's step.
    """
    parts = parts_of_shape(FLAVORS[flavor].shape)
    tokens, nitp = sequences * CONTEXT, NITPConfig()
    operations = nitp_operations(parts.dim, tokens, ratio=nitp.projector_ratio, ranks=ranks)
    assert sum(operation.flops for operation in operations) == tokens * nitp_flops(parts.dim, nitp)
    assert projector_params(parts.dim, nitp) == 3 * nitp.projector_ratio * parts.dim**2
    per_token = flops(parts, CONTEXT)["with_attention"]
    assert per_token is not None
    return Roofline(flavor=flavor, tokens=tokens, operations=operations, step_flops=per_token * tokens, device=device)


def rows(line: Roofline) -> list[tuple[str, str, str, str, str]]:
    """Return (operation, GFLOPs, MB, ms at the limit, limit) as text, the last row for all together."""

    def row(name: str, work: float, moved: float, seconds: float, limit: str) -> tuple[str, str, str, str, str]:
        return name, f"{work / 1e9:,.0f}", f"{moved / 1e6:,.0f}", f"{1e3 * seconds:.3f}", limit

    device = line.device
    each = [row(op.name, op.flops, op.bytes, op.seconds(device), op.limit(device)) for op in line.operations]
    return [*each, row("NITP", line.nitp_flops, line.nitp_bytes, line.nitp_seconds, "")]


def table(line: Roofline) -> Table:
    """Return the roofline for the console."""
    from rich.table import Table

    shown = Table(title=f"{line.flavor}: what NITP adds to a step of {line.tokens:,} tokens on one {line.device.name}")
    shown.add_column("operation")
    for name in ("GFLOPs", "MB", "ms", "limit"):
        shown.add_column(name, justify="right")
    *operations, total = rows(line)
    for row in operations:
        shown.add_row(*row)
    shown.add_section()
    shown.add_row(*total)
    at = [f"{line.overhead_percent(mfu):.2f} % at {100 * mfu:.0f} % MFU" for mfu in MFUS]
    shown.caption = f"over a step without NITP: {', '.join(at)}"
    return shown


MFUS = (1.0, 0.6, 0.5, 0.4, 0.3)
"""Shares of the peak at which a step without NITP may run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flavor", choices=[f for f in FLAVORS if not f.startswith("debug")], default="0.5B")
    parser.add_argument("--sequences", type=int, default=4, help="of a rank's step (%(default)s)")
    parser.add_argument("--ngpu", type=int, default=1, help="ranks that share the weights (%(default)s)")
    options = parser.parse_args(arguments)
    from rich.console import Console

    Console().print(table(roofline(options.flavor, sequences=options.sequences, ranks=options.ngpu)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
