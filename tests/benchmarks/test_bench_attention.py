"""The benchmark of flex attention's tiles at toy size: what it compares, chooses, hands on. No times are asserted."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import Attention, Case
from benchmarks.tiles import TORCHS, candidates
from benchmarks.variants import parse_variant
from nitp_titan.models.flex_options import FlexKernelOptions, default_options, problems

CASE = Case(flavor="debug", sequences=2, seq_len=96, mean_document=20, device="cpu", compile=False)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("head_dim", [64, 160])
def test_candidates_are_what_a_job_can_set(direction, head_dim):
    found = candidates(direction, head_dim)
    assert found.pop(TORCHS) == {}
    assert len(found) > 6
    for options in found.values():
        assert options.keys() <= set(FlexKernelOptions.__dataclass_fields__)
        assert list(problems(options)) == []
    # Ours is among them where a head dim has one.
    ours = {name: value for name, value in default_options(head_dim).items() if name in next(iter(found.values()))}
    assert not ours or ours in found.values()


def test_error_is_against_dense_attention_in_documents():
    measured = Attention(CASE)
    expected = measured.reference()
    assert measured.error({}, expected) < 1e-5
    # Of another mask it would be large: the comparison can fail.
    measured.document_L = torch.zeros_like(measured.document_L)
    assert measured.error({}, measured.reference()) > 0.1


def test_the_fastest_right_one_is_handed_on(tmp_path):
    names = list(candidates("forward", 32))
    found = {("forward", name): ([1.0], 0.001) for name in names}
    found["forward", names[2]] = [0.5], 0.001
    found["forward", names[3]] = [0.1], 0.5  # wrong
    found["forward", names[4]] = None, "OutOfResources: shared memory"
    result = attention._result(CASE, found)
    assert result["skipped"] == {f"forward {names[4]}": "OutOfResources: shared memory"}
    assert result["fastest"] == candidates("forward", 32)[names[2]]
    (tmp_path / "x.json").write_text(json.dumps({"attention": [result]}))
    words = attention.fastest(tmp_path / "x.json", "debug")
    variant = parse_variant(f"tiles:{words}")
    assert variant.overrides[-4:] == tuple(
        f"--model.flex_kernel_options.{name}={value}" for name, value in result["fastest"].items()
    )
    with pytest.raises(ValueError, match=r"--flavors: found '9B', which .*x\.json does not have"):
        attention.fastest(tmp_path / "x.json", "9B")


def test_program(tmp_path, capsys):
    out = tmp_path / "x.json"
    words = ["--device", "cpu", "--flavors", "debug", "--sequences", "1", "--seq-len", "64", "--mean-document", "20"]
    assert attention.main([*words, "--workers", "2", "--repeats", "1", "--steps", "1", "--out", str(out)]) == 0
    [case] = json.loads(out.read_text())["attention"]
    assert set(case["forward"]) == set(candidates("forward", 32))
    assert case["skipped"] == {}
    assert "debug, forward" in capsys.readouterr().out
    assert attention.main(["--device", "cpu", "--flavors", "nobody's"]) == 2
    assert '--flavors: found "nobody\'s", expected some of' in capsys.readouterr().err
