"""Every way to take the loss against float64, and the program around them at toy size."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import loss
from benchmarks.heads import IMPLEMENTATIONS, Case, Head, Problem, Unavailable, joint_decoder, ours_with_nitp
from benchmarks.loss import MIB, Memory, summarize_case
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.nitp.objective import nitp_loss, pair_mask, shift_left

CASE = Case(
    tokens=96,
    vocab_size=130,
    dim=24,
    dtype="float32",
    device="cpu",
    seq_len=48,
    compile=False,
    chunk_tokens=40,
)


def exact(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of cross-entropies in float64, and its gradients of hidden states and weight."""
    h, weight = problem.h_BLD.detach().double().requires_grad_(), problem.weight_VD.detach().double().requires_grad_()
    value = F.cross_entropy(F.linear(h, weight).flatten(0, 1), problem.labels_BL.flatten(), reduction="sum")
    return value.detach(), *torch.autograd.grad(value, (h, weight))


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "liger" and "+nitp" not in name])
def test_loss_and_gradients_are_exact(name):
    problem = Problem(CASE)
    value, h_grad, weight_grad = exact(problem)
    try:
        head = IMPLEMENTATIONS[name][0](problem)
    except Unavailable as reason:
        pytest.skip(str(reason))
    for _ in range(2):  # the second on clear gradients
        assert head.step() == pytest.approx(value.item(), rel=1e-5)
        torch.testing.assert_close(problem.h_BLD.grad.double(), h_grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(problem.weight_VD.grad.double(), weight_grad, rtol=1e-4, atol=1e-4)
    head.release()
    assert problem.h_BLD.grad is None
    assert problem.weight_VD.grad is None


@pytest.mark.parametrize("name", ["ours+nitp", "ours_recomputed+nitp"])
def test_the_nitp_term_is_the_objectives(name):
    problem = Problem(CASE)
    value, h_grad, weight_grad = exact(problem)
    head = IMPLEMENTATIONS[name][0](problem)
    assert head.step() == pytest.approx(value.item(), rel=1e-5)
    found = problem.h_BLD.grad.double()

    projector = head.more.projector
    h = problem.h_BLD.detach().requires_grad_()
    target = shift_left(h.detach())
    mask = pair_mask(problem.positions_BL, problem.labels_BL)
    assert 0 < mask.sum() < mask.numel()
    (extra,) = torch.autograd.grad(nitp_loss(projector(h), target, mask), h)
    torch.testing.assert_close(found, h_grad + extra.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(problem.weight_VD.grad.double(), weight_grad, rtol=1e-4, atol=1e-4)
    assert all(p.grad is not None for p in projector.parameters())
    head.forget()
    assert all(p.grad is None for p in projector.parameters())


def test_compiled_is_the_same():
    problem = Problem(CASE)
    plain = ours_with_nitp(problem).step()
    gradient = problem.h_BLD.grad.clone()
    compiled = Problem(replace(CASE, compile=True))
    assert ours_with_nitp(compiled).step() == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(compiled.h_BLD.grad, gradient, rtol=1e-4, atol=1e-5)


def test_the_head_of_a_decoder_is_all_there_is():
    model = joint_decoder(Problem(CASE), NITPConfig())
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"projector", "lm_head"}


def test_what_cannot_run_says_why(monkeypatch):
    problem = Problem(CASE)
    with pytest.raises(Unavailable, match="need a GPU"):
        IMPLEMENTATIONS["liger"][0](problem)
    with pytest.raises(Unavailable, match="does not split into 8"):
        IMPLEMENTATIONS["torchtitan_chunked"][0](Problem(replace(CASE, tokens=90, seq_len=45)))
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(Unavailable, match="has no linear_cross_entropy"):
        IMPLEMENTATIONS["torch_chunked"][0](problem)


def test_what_fails_does_not_stop_the_others(monkeypatch):
    """While it is prepared, or when it is timed."""

    def failing(runs: int):
        def build(problem: Problem) -> Head:
            whole, calls = IMPLEMENTATIONS["torchtitan_plain"][0](problem), []

            def losses():
                calls.append(0)
                if len(calls) > runs:
                    raise RuntimeError("a kernel broke\nand why")
                return whole.losses()

            return Head(problem, losses)

        return build

    monkeypatch.setitem(IMPLEMENTATIONS, "at once", (failing(0), ""))
    monkeypatch.setitem(IMPLEMENTATIONS, "late", (failing(6), ""))  # four times before it is timed
    found = loss.run_case(CASE, ["at once", "ours", "late", "ours+nitp"], rounds=2, steps=1)
    assert list(found["implementations"]) == ["ours", "ours+nitp"]
    assert found["skipped"] == dict.fromkeys(["at once", "late"], "RuntimeError: a kernel broke")
    assert found["largest_relative_difference_of_losses"] < 1e-5


def test_figures_of_a_case():
    seconds = {"ours": [0.1, 0.2], "ours+nitp": [0.115, 0.23], "liger": [0.3, 0.3]}
    memory = {"ours": Memory(100 * MIB, MIB), "ours+nitp": Memory(150 * MIB, 3 * MIB), "liger": Memory(MIB, 0)}
    found = summarize_case(CASE, seconds, memory, {"ours": 2.0, "ours+nitp": 2.0, "liger": 2.1}, {"x": "why"})
    assert found["implementations"]["liger"]["time_over"] == {"ours": 2}
    assert found["implementations"]["ours"]["ms"] == {"median": 150, "min": 100, "max": 200}
    assert found["nitp"]["time_overhead_percent"] == pytest.approx(15)
    assert found["nitp"]["by_round"]["max"] == pytest.approx(15)
    assert found["nitp"]["peak_above_cross_entropy_mib"] == 50
    assert found["nitp"]["kept_above_cross_entropy_mib"] == 2
    assert found["largest_relative_difference_of_losses"] == pytest.approx(0.05)
    assert found["skipped"] == {"x": "why"}
    assert "nitp" not in summarize_case(CASE, {"liger": [1.0]}, memory, {"liger": 1.0}, {})


def test_program(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as --device cpu does, and given back afterwards
    out = tmp_path / "loss.json"
    words = ["--tokens", "64,128", "--vocab", "256", "--width", "16", "--chunk-tokens", "32", "--device", "cpu"]
    assert loss.main([*words, "--repeats", "2", "--steps", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {"device", "torch", "torchtitan", "commit", "cases"} <= found.keys()
    assert [(case["tokens"], case["vocabulary"], case["width"]) for case in found["cases"]] == [
        (64, 256, 16),
        (128, 256, 16),
    ]
    for case in found["cases"]:
        assert set(case["implementations"]) | set(case["skipped"]) == set(IMPLEMENTATIONS)
        assert "liger" in case["skipped"]
        assert case["largest_relative_difference_of_losses"] < 1e-5
        memory = {name: values["peak_memory_mib"] for name, values in case["implementations"].items()}
        # Whole logits and their gradient, at least.
        assert memory["torchtitan_plain"] >= 2 * case["tokens"] * 256 * 4 / MIB
        assert case["nitp"]["kept_above_cross_entropy_mib"] > 0
    assert "NITP adds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--implementations", "ours,nope"], "found 'nope', expected some of ours"),
        (["--tokens", "many"], "found 'many', expected whole numbers of at least 1"),
        (["--tokens", "64,0"], "--tokens: found '64,0', expected whole numbers of at least 1"),
        (["--vocab", "-3"], "--vocab: found '-3', expected whole numbers of at least 1"),
        (["--width", ""], "--width: found '', expected whole numbers of at least 1"),
        (["--chunk-tokens", "0"], "--chunk-tokens: found 0, expected at least 1"),
        (["--seq-len", "0"], "--seq-len: found 0, expected at least 1"),
        (["--out", "/dev/null/x.json"], "--out: /dev/null/x.json cannot be written: /dev/null is not a folder"),
        (["--tokens", "100", "--seq-len", "64"], "expected a multiple of --seq-len 64"),
    ],
)
def test_wrong_options(words, message, capsys):
    assert loss.main(words) == 2
    assert message in capsys.readouterr().err
