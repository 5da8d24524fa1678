"""Float8 grouped products of routed experts: the emulated ones against loops in float64, and where they are put."""

from __future__ import annotations

import pytest
import torch
from torchtitan.components.quantization.utils import has_quantization
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.common.token_dispatcher import TorchAOTokenDispatcher

from nitp_titan.float8 import converter as converter_module
from nitp_titan.float8 import experts as experts_module
from nitp_titan.float8.config import Float8Config
from nitp_titan.float8.converter import Float8Converter
from nitp_titan.float8.experts import EmulatedGroupedMM, float8_experts_config
from nitp_titan.models.experts import DtypePreservingGroupedExperts
from tests.helpers.decoders import backbone

COUNTS = (5, 0, 16, 1)
"""Rows of each expert, none of them padded."""


def rounded(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Round to float8 e4m3 and back in float64, a power of two for each slice along ``dim``."""
    amax = x.abs().amax(dim, keepdim=True).clamp(min=1e-12)
    scale = torch.exp2(torch.floor(torch.log2(448 / amax)))
    return (x * scale).float().to(torch.float8_e4m3fn).double() / scale


def simulated(a: torch.Tensor, b: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """a (R, K), b (E, K, N), grad (R, N), float64 -> output and both gradients, an expert at a time."""
    outputs, a_grads, b_grads, start = [], [], [], 0
    for count, matrix in zip(COUNTS, b, strict=True):
        rows = slice(start, start + count)
        start += count
        outputs.append(rounded(a[rows], 1) @ rounded(matrix, 0))
        a_grads.append(rounded(grad[rows], 1) @ rounded(matrix.T, 0))
        b_grads.append(rounded(a[rows], 0).T @ rounded(grad[rows], 0) if count else torch.zeros_like(matrix))
    return torch.cat(outputs), torch.cat(a_grads), torch.stack(b_grads)


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    rows = sum(COUNTS)
    a, b, grad = torch.randn(rows, 32), torch.randn(len(COUNTS), 32, 48), torch.randn(rows, 48)
    for tensor in (a, b, grad):
        # So different in size that under another slice's scale some would vanish.
        tensor *= torch.logspace(-3, 3, tensor.shape[-1])
        tensor *= torch.logspace(3, -3, tensor.shape[-2]).unsqueeze(-1)
    return tuple(tensor.to(dtype) for tensor in (a, b, grad))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of any row or column."""
    error, size = (found.double() - expected).square(), expected.square()
    ratios = [(error.sum(dim) / size.sum(dim)).nan_to_num(0).max() for dim in (-1, -2)]
    return max(ratios).sqrt().item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_emulated_products_are_those_of_the_recipe(dtype, tolerance):
    a, b, grad = operands(dtype)
    offs = torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)
    a.requires_grad_(), b.requires_grad_()
    output = EmulatedGroupedMM.apply(a, b, offs)
    output.backward(grad)
    expected = simulated(a.detach().double(), b.detach().double(), grad.double())
    for found, wanted in zip((output, a.grad, b.grad), expected, strict=True):
        assert found.dtype == dtype
        assert distance(found, wanted) < tolerance


def test_scales_of_the_weights_gradient_are_each_experts_own():
    a, b, grad = operands(torch.float32)
    offs = torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)
    small = a.clone()
    small[5:] *= 2**-12  # all but the first expert's rows, by a power of two: float8 has the same digits for them
    grads = []
    for rows in (a, small):
        weights = b.clone().requires_grad_()
        EmulatedGroupedMM.apply(rows, weights, offs).backward(grad)
        grads.append(weights.grad)
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][2:] * 2**-12, grads[1][2:])


def experts_of(base: type[GroupedExperts], *, emulate: bool) -> GroupedExperts:
    plain = base.Config(dim=32, hidden_dim=48, num_experts=len(COUNTS), param_init={})
    experts = float8_experts_config(plain, emulate=emulate).build()
    assert isinstance(experts, base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.1)
    return experts


@pytest.mark.parametrize("base", [DtypePreservingGroupedExperts, GroupedExperts])
def test_experts_of_any_class_multiply_in_float8(base):
    experts = experts_of(base, emulate=True)
    plain = base.Config(dim=32, hidden_dim=48, num_experts=len(COUNTS), param_init={}).build()
    plain.load_state_dict(experts.state_dict())
    x, counts = torch.randn(sum(COUNTS), 32), torch.tensor(COUNTS)
    found, expected = experts(x, counts), plain(x, counts)
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-3 < error < 0.1
    assert [type(p.data) for p in experts.parameters()] == [torch.Tensor] * 3


@pytest.mark.parametrize("base", [DtypePreservingGroupedExperts, GroupedExperts])
def test_torchaos_products_get_what_they_ask_for(base, monkeypatch):
    """The layouts and types that torchao/prototype/moe_training/fp8_grouped_mm.py asserts; it runs on a GPU alone."""
    calls = []

    def product(A, B_t, config, offs):
        calls.append((A.shape, B_t.shape))
        assert A.dtype in (torch.float32, torch.bfloat16)
        assert B_t.dtype == A.dtype
        assert offs.dtype == torch.int32
        assert A.stride(-1) == 1
        assert B_t.stride(-2) == 1
        assert not config.pad_token_groups_for_grouped_mm
        return torch._grouped_mm(A.bfloat16(), B_t.bfloat16(), offs=offs)

    monkeypatch.setattr(experts_module, "_quantize_then_scaled_grouped_mm", product)
    x = torch.randn(sum(COUNTS), 32)
    out = experts_of(base, emulate=False)(x, torch.tensor(COUNTS))
    assert out.dtype == x.dtype
    assert [(a[1], b[1:]) for a, b in calls] == [(32, (32, 48)), (32, (32, 48)), (48, (48, 32))]


@pytest.mark.parametrize(("module", "flavor"), [("nitp_titan", "debug_moe"), ("qwen3", "debugmodel_moe")])
@pytest.mark.parametrize("emulate", [True, False])
def test_the_converter_pads_for_kernels_and_not_for_what_emulates_them(module, flavor, emulate, monkeypatch):
    monkeypatch.setattr(converter_module, "has_cuda_capability", lambda major, minor: True)
    monkeypatch.setattr(converter_module, "_has_grouped_products", lambda: True)
    # The experts alone.
    float8 = Float8Config(recipe="rowwise", experts=True, emulate=emulate, filter_fqns=["layers"])
    config = Float8Converter.Config(float8=float8, tokens=1024).build().convert(backbone(module, flavor).model)
    for _, experts, parent, _ in config.traverse(GroupedExperts.Config):
        assert type(experts)._owner.__name__.startswith("Float8[")
        assert isinstance(parent.token_dispatcher, TorchAOTokenDispatcher.Config) is not emulate
        assert getattr(parent.token_dispatcher, "pad_multiple", 16) == 16
    # TorchTitan prints no MFU against bf16's peak for them.
    assert has_quantization(config)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="torchao's grouped products need compute capability 9 or 10",
)
def test_torchaos_products_are_the_emulated_ones():
    counts = torch.tensor([16, 0, 32, 16], device="cuda")  # the kernels take multiples of 16
    found = []
    for emulate in (True, False):
        experts = experts_of(DtypePreservingGroupedExperts, emulate=emulate).to("cuda", torch.bfloat16)
        torch.manual_seed(1)
        x = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        output = experts(x, counts)
        output.square().sum().backward()
        found.append([output, x.grad, *(p.grad for p in experts.parameters())])
    for emulated, real in zip(*found, strict=True):
        assert (emulated - real).float().norm() / emulated.float().norm() < 2**-6
