"""The roofline against the costs that the reports use, and an operation by hand."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.roofline import H100, Accelerator, Operation, cross_entropy_operations, main, nitp_operations, roofline
from nitp_titan.models.costs import flops, nitp_flops, parts_of_shape
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.nitp.config import NITPConfig


@pytest.mark.parametrize("ratio", [2, 4])
def test_flops_are_those_of_the_report(ratio):
    found = sum(operation.flops for operation in nitp_operations(96, 1000, ratio=ratio))
    assert found == 1000 * nitp_flops(96, NITPConfig(projector_ratio=ratio))


def test_bytes_by_hand():
    d, t = 10, 7
    found = {operation.name: operation for operation in nitp_operations(d, t, ranks=2)}
    # h is read, gate and up (4 d each) are written, with 8 d^2 weights; bf16.
    forward = found["gate and up, forward"]
    assert (forward.flops, forward.bytes) == (2 * t * d * 80, 2 * (t * d + t * 80 + 800))
    assert found["SwiGLU, forward"].bytes == 2 * t * (80 + 40)
    # Gradient of the input: dp and weights in, da out. Gradient of the weights: a and dp in, weights' size out.
    down = found["down, backward"]
    assert (down.flops, down.bytes) == (4 * t * 40 * d, 2 * (2 * (t * d + t * 40 + 400)))
    assert found["SwiGLU, backward"].bytes == 2 * t * (80 + 40 + 80)
    weights = found["weights: cast, gradients, AdamW"]
    assert weights.bytes == 1200 * (4 + 2 + 2 + 4) + 600 * 4 * 7


def test_cross_entropy_by_hand():
    logits, softmax, of_h, of_weight = cross_entropy_operations(10, 7, 100)
    assert (logits.flops, logits.bytes) == (2 * 7 * 10 * 100, 2 * (7 * 10 + 7 * 100 + 10 * 100))
    assert (softmax.flops, softmax.bytes) == (0, 2 * 3 * 700)
    assert of_h == dataclasses.replace(logits, name="gradient of h")
    assert of_weight == dataclasses.replace(logits, name="gradient of the weight")
    # The paper's: 6 V d a token.
    assert logits.flops + of_h.flops + of_weight.flops == 6 * 100 * 10 * 7


def test_cross_entropy_in_chunks_by_hand():
    """Three chunks: the weight is read three times, and its gradient is a sum in fp32."""
    whole = cross_entropy_operations(10, 7, 100)
    logits, softmax, of_h, of_weight = cross_entropy_operations(10, 7, 100, chunk_tokens=3)
    assert [op.flops for op in (logits, softmax, of_h, of_weight)] == [op.flops for op in whole]
    assert logits.bytes == of_h.bytes == 2 * (7 * 10 + 7 * 100 + 3 * 10 * 100)
    # Written, read and written, read and written; read, and written in bf16.
    assert of_weight.bytes == 2 * (7 * 10 + 7 * 100) + 1000 * (4 + 4 + 4 + 4 + 4 + 4 + 2)


def test_an_operation_takes_the_longer_of_its_limits():
    device = Accelerator(name="x", flops=100, bandwidth=10, source="")
    assert Operation(name="a", flops=300, bytes=20).seconds(device) == 3
    assert Operation(name="a", flops=300, bytes=20).limit(device) == "FLOPs"
    assert Operation(name="a", flops=300, bytes=50).seconds(device) == 5
    assert Operation(name="a", flops=300, bytes=50).limit(device) == "bytes"


@pytest.mark.parametrize("flavor", ["0.5B", "9B-A1B"])
def test_overhead_over_a_step(flavor):
    line = roofline(flavor, sequences=3)
    assert line.tokens == 3 * 8192
    parts = parts_of_shape(FLAVORS[flavor].shape)
    step = flops(parts, 8192)["with_attention"] * line.tokens / H100.flops
    assert line.overhead_percent(1.0) == pytest.approx(100 * line.nitp_seconds / step)
    # A step that runs at half the peak takes twice as long.
    assert line.overhead_percent(0.5) == pytest.approx(line.overhead_percent(1.0) / 2)
    # Not below its FLOPs alone, nor above FLOPs and bytes one after the other.
    work = line.nitp_flops / H100.flops
    assert work < line.nitp_seconds < work + line.nitp_bytes / H100.bandwidth


def test_program(capsys):
    assert main(["--flavor", "0.5B", "--sequences", "1"]) == 0
    assert "gate and up, forward" in capsys.readouterr().out
