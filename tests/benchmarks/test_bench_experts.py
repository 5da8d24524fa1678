"""The experts' benchmark at toy size: what it computes and counts. No times are asserted."""

from __future__ import annotations

import json

import pytest

from benchmarks import experts
from benchmarks.experts import Case, implementations
from nitp_titan.models.flavors import FLAVORS

CASE = Case(flavor="debug_moe", tokens=96, device="cpu", dtype="float32")


def test_implementations_compute_the_same():
    runners = implementations(CASE, compile=False)
    assert list(runners) == ["ours", "torchtitan"]  # 128 wide already
    ours, theirs = runners.values()
    theirs.module.load_state_dict(ours.module.state_dict())
    for runner in runners.values():
        runner.run(1)
    found = [(r.x_RD.grad, *(p.grad for p in r.module.parameters())) for r in runners.values()]
    for a, b in zip(*found, strict=True):
        # TorchTitan's compute in bfloat16.
        assert ((a - b).norm() / a.norm()).item() < 2e-2
    ours.release()
    assert ours.x_RD.grad is None


def test_rows_are_all_given_out():
    runner = implementations(CASE, compile=False)["ours"]
    shape = FLAVORS["debug_moe"].shape
    assert int(runner.counts_E.sum()) == len(runner.x_RD) == 96 * shape.top_k
    assert runner.counts_E.unique().numel() > 1


def test_flops_are_the_products():
    shape = FLAVORS["debug_moe"].shape
    rows, dim, hidden = 96 * shape.top_k, shape.dim, shape.expert_hidden_dim
    assert sum(operation.flops for operation in CASE.operations) == 9 * 2 * rows * dim * hidden


def test_a_narrow_experts_twin_is_a_tile_wider():
    case = Case(flavor="1.9B-A0.3B", tokens=8192, device="meta", dtype="bfloat16")
    runners = implementations(case, compile=False)
    assert list(runners) == ["ours", "torchtitan", "ours, width 512"]
    assert runners["ours, width 512"].module.w1_EFD.shape == (144, 512, 512)


def test_program(tmp_path, capsys):
    words = ["--device", "cpu", "--repeats", "2", "--steps", "1", "--tokens", "32,64", "--out", f"{tmp_path}/x.json"]
    assert experts.main(words) == 0
    result = json.loads((tmp_path / "x.json").read_text())
    assert [case["tokens"] for case in result["experts"]] == [32, 64]
    assert all(set(case["implementations"]) == {"ours", "torchtitan"} for case in result["experts"])
    assert "limit_ms" not in result["experts"][0]
    assert "debug_moe, 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flavors", "0.5B"], "--flavors: found '0.5B', expected some of debug_moe"),
        (["--tokens", "0"], "--tokens: found '0', expected whole numbers"),
        (["--out", "/dev/null/x.json"], "--out: /dev/null/x.json cannot be written"),
    ],
)
def test_wrong_options_are_told(words, message, capsys):
    assert experts.main(["--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err
