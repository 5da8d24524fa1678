"""What the joint loss takes at real sizes: the count that no device is needed for, and its own checks."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks import loss, loss_memory
from benchmarks.heads import Case

D, V, TOKENS = 896, 152_064, 8192
REAL = Case(
    tokens=TOKENS,
    vocab_size=V,
    dim=D,
    dtype="bfloat16",
    device="meta",
    seq_len=TOKENS,
    compile=False,
    chunk_tokens=2048,
)


@pytest.fixture(scope="module")
def counted() -> dict:
    return loss_memory.count(REAL)


def test_nitp_adds_nothing_to_the_peak_at_the_sizes_of_the_smallest_model(counted):
    added = counted["nitp_adds"]
    assert added["ours"]["peak_memory_mib"] == 0
    assert added["ours_recomputed"]["peak_memory_mib"] <= 64
    # Gradients of hidden states and projector, in bf16.
    assert added["ours"]["kept_memory_mib"] == pytest.approx((TOKENS * D + 12 * D * D) * 2 / loss.MIB, rel=1e-3)
    assert added["ours_recomputed"]["kept_memory_mib"] < 1


def test_cross_entropies_take_what_they_must(counted):
    found = counted["implementations"]
    whole_logits = TOKENS * V * 2 / loss.MIB
    assert found["torchtitan_plain"]["peak_memory_mib"] > 3 * whole_logits
    # A chunk's logits twice in bf16 and twice in fp32, beside the weight's gradient of the chunks so far.
    chunk, weight, hidden = 2048 * V / loss.MIB, V * D / loss.MIB, TOKENS * D * 2 / loss.MIB
    assert found["ours"]["peak_memory_mib"] == pytest.approx(12 * chunk + 4 * weight + hidden, rel=0.01)
    assert found["ours"]["kept_memory_mib"] == pytest.approx(4 * weight + hidden, rel=1e-3)


def test_program(tmp_path, capsys):
    out = tmp_path / "memory.json"
    words = ["--tokens", "64,128", "--vocab", "256", "--width", "16", "--chunk-tokens", "32", "--out", str(out)]
    assert loss_memory.main(words) == 0
    result = json.loads(out.read_text())
    assert [case["tokens"] for case in result["cases"]] == [64, 128]
    assert result["device_type"] == "meta"
    assert "128 x 256 x 16" in capsys.readouterr().out
    assert loss_memory.main(["--tokens", "many"]) == 2
    assert "found 'many', expected whole numbers" in capsys.readouterr().err
    assert loss_memory.main([*words[:-1], "/dev/null/x.json"]) == 2
    assert "--out: /dev/null/x.json cannot be written" in capsys.readouterr().err


def test_sizes_are_those_of_a_gpu_where_none_are_given():
    parser = argparse.ArgumentParser()
    loss.add_sizes(parser)
    found = loss.cases(parser.parse_args([]), "meta", compile=False)
    assert {(case.tokens, case.dim) for case in found} == {(8192, 896), (8192, 1280), (32768, 896), (32768, 1280)}
    assert {case.dtype for case in found} == {"bfloat16"}
