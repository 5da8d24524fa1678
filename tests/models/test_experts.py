"""Grouped experts against a loop over experts, in the dtype of their parameters."""

import pytest
import torch
import torch.nn.functional as F

from nitp_titan.models.experts import DtypePreservingGroupedExperts, grouped_mm


def experts_and_rows(dtype: torch.dtype) -> tuple[DtypePreservingGroupedExperts, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    experts = DtypePreservingGroupedExperts.Config(dim=16, hidden_dim=32, num_experts=4, param_init={}).build()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    experts.to(dtype)
    counts = torch.tensor([3, 0, 5, 4])
    return experts, torch.randn(12, 16, dtype=dtype, requires_grad=True), counts


def loop(experts: DtypePreservingGroupedExperts, x_RD: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    rows = []
    for e, x in enumerate(x_RD.split(counts.tolist())):
        rows.append((F.silu(x @ experts.w1_EFD[e].T) * (x @ experts.w3_EFD[e].T)) @ experts.w2_EDF[e].T)
    return torch.cat(rows)


def test_fp32_values_and_gradients_are_the_loops():
    experts, x_RD, counts = experts_and_rows(torch.float32)
    inputs = [x_RD, *experts.parameters()]
    weight = torch.randn(12, 16)
    expected = torch.autograd.grad((loop(experts, x_RD, counts) * weight).sum(), inputs)
    out_RD = experts(x_RD, counts)
    torch.testing.assert_close(out_RD, loop(experts, x_RD, counts), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((out_RD * weight).sum(), inputs)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_output_keeps_the_dtype_of_the_input():
    experts, x_RD, counts = experts_and_rows(torch.bfloat16)
    assert experts(x_RD, counts).dtype == torch.bfloat16
    torch.testing.assert_close(experts(x_RD, counts), loop(experts, x_RD, counts), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_grouped_mm_is_a_sound_operator(compiled):
    _, x_RD, counts = experts_and_rows(torch.float32)
    b_EKN = torch.randn(4, 16, 8, requires_grad=True)
    offs = counts.cumsum(0, dtype=torch.int32)
    if not compiled:
        torch.library.opcheck(grouped_mm, (x_RD, b_EKN, offs))
        return
    function = torch.compile(lambda *args: grouped_mm(*args), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(x_RD, b_EKN, offs), grouped_mm(x_RD, b_EKN, offs))
