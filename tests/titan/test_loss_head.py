"""The unembedding with a loss: values, gradients and memory against the plain computation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torchtitan.models.common.linear import Linear

from nitp_titan.nitp.chunked_sum import ChunkedSum
from nitp_titan.titan.loss_head import loss_head_config
from tests.helpers.ranks import run_on_ranks


class CappedLinear(Linear):
    """An unembedding with a bias and a forward pass of its own, as muse_glimmer's."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        cap: float = 1.5

    def __init__(self, config: Config):
        super().__init__(config)
        self.cap = config.cap

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.cap * torch.tanh(super().forward(input) / self.cap)


def head_and_batch(base: type[Linear], chunk_tokens: int, *, bias: bool = True, dtype: torch.dtype = torch.float32):
    """An unembedding, hidden states and labels. A bias or a forward pass of its own takes the general way."""
    torch.manual_seed(0)
    config = base.Config(in_features=16, out_features=40, bias=bias)
    head = loss_head_config(config, ChunkedSum(chunk_tokens)).build().to(dtype)
    h_BLD = torch.randn(3, 7, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(40, (3, 7))
    labels[0, 3] = labels[2] = -100
    return head, h_BLD, labels


def plain(head: Linear, h_BLD: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = head(h_BLD).flatten(0, 1).float()
    return F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize(("base", "bias"), [(Linear, False), (Linear, True), (CappedLinear, True)])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 21, 100])
def test_sum_and_gradients_are_those_of_the_whole(base, bias, chunk_tokens):
    head, h_BLD, labels = head_and_batch(base, chunk_tokens, bias=bias)
    inputs = [h_BLD, *head.parameters()]
    expected = torch.autograd.grad(0.3 * plain(head, h_BLD, labels), inputs)
    found = head(h_BLD, labels=labels)
    torch.testing.assert_close(found, plain(head, h_BLD, labels))
    for f, e in zip(torch.autograd.grad(0.3 * found, inputs), expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize(("base", "bias"), [(Linear, False), (CappedLinear, True)])
def test_fast_and_reference_agree(base, bias):
    head, h_BLD, labels = head_and_batch(base, 4, bias=bias)
    inputs = [h_BLD, *head.parameters()]
    fast = head(h_BLD, labels=labels)
    head.chunked_sum = ChunkedSum(4, "reference")
    reference = head(h_BLD, labels=labels)
    assert (type(fast.grad_fn).__name__, type(reference.grad_fn).__name__) == ("_EagerSumBackward", "AddBackward0")
    torch.testing.assert_close(fast, reference)
    pairs = zip(torch.autograd.grad(fast, inputs), torch.autograd.grad(reference, inputs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("implementation", ["fast", "reference"])
def test_float64_is_the_whole_computation_in_float64(implementation):
    torch.manual_seed(0)
    config = Linear.Config(in_features=16, out_features=40)
    head = loss_head_config(config, ChunkedSum(4, implementation)).build().double()
    # TorchTitan's cross-entropy rounds logits to fp32.
    head._cross_entropy = lambda logits, labels: F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100
    )
    h_BLD = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(40, (3, 7))
    found = torch.autograd.grad(head(h_BLD, labels=labels), [h_BLD, head.weight])
    logits = F.linear(h_BLD, head.weight).flatten(0, 1)
    expected = torch.autograd.grad(F.cross_entropy(logits, labels.flatten(), reduction="sum"), [h_BLD, head.weight])
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-6)


def gradients_of_sharded_vocabulary(implementation: str, bias: bool) -> list[torch.Tensor]:
    """A vocabulary over two ranks, as TorchTitan's tensor parallelism shards it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend("partial_dtensor")
    head, h_BLD, labels = head_and_batch(Linear, 4, bias=bias)
    head.chunked_sum = ChunkedSum(4, implementation)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for name, parameter in list(head.named_parameters()):
        setattr(head, name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    h = DTensor.from_local(h_BLD, mesh, [Replicate()])
    h.retain_grad()
    total = head(h, labels=labels)
    (0.3 * total).backward()
    return [total.detach(), *(tensor.grad.full_tensor() for tensor in (h, *head.parameters()))]


@pytest.mark.parametrize(("implementation", "bias"), [("fast", False), ("fast", True), ("reference", False)])
def test_sharded_vocabulary_has_the_whole_ones_gradients(implementation, bias):
    head, h_BLD, labels = head_and_batch(Linear, 4, bias=bias)
    total = plain(head, h_BLD, labels)
    expected = [total.detach(), *torch.autograd.grad(0.3 * total, [h_BLD, *head.parameters()])]
    for rank in run_on_ranks(2, gradients_of_sharded_vocabulary, implementation, bias):
        for f, e in zip(rank, expected, strict=True):
            torch.testing.assert_close(f, e)


def test_without_gradients_the_sum_is_the_same():
    head, h_BLD, labels = head_and_batch(Linear, 4)
    with torch.no_grad():
        torch.testing.assert_close(head(h_BLD, labels=labels), plain(head, h_BLD, labels))


@pytest.mark.parametrize("no_grad", [False, True])
def test_logits_exist_a_chunk_at_a_time(no_grad):
    head, h_BLD, labels = head_and_batch(Linear, 8)
    rows, cross_entropy = [], head._cross_entropy
    head._cross_entropy = lambda logits, y: rows.append(logits.shape[:2]) or cross_entropy(logits, y)
    with torch.set_grad_enabled(not no_grad):
        total = head(h_BLD, labels=labels)
    if not no_grad:
        total.backward()
    assert rows == [(1, 7)] * 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_weight_gradient_of_many_bf16_chunks_is_added_up_in_fp32(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    head = loss_head_config(Linear.Config(in_features=32, out_features=64), ChunkedSum(16)).build()
    head.to(device, torch.bfloat16)
    h_BLD = torch.randn(4, 512, 32, dtype=torch.bfloat16, device=device, requires_grad=True)
    labels = torch.randint(64, (4, 512), device=device)
    head(h_BLD, labels=labels).backward()
    weight = head.weight.detach().double().requires_grad_()
    logits = h_BLD.detach().double() @ weight.T
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    error = (head.weight.grad.double() - weight.grad).norm() / weight.grad.norm()
    # One rounding of bfloat16 at the end, and those of the logits; 128 roundings would be several times as much.
    assert error < 4e-3


@pytest.mark.parametrize(("base", "bias", "added"), [(Linear, False, 2), (Linear, True, 0), (CappedLinear, False, 0)])
def test_a_plain_unembeddings_weight_gradient_is_added_up_by_its_products(base, bias, added):
    head, h_BLD, labels = head_and_batch(base, 8, bias=bias)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        head(h_BLD, labels=labels).backward()
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::addmm_") == added


def test_a_frozen_unembedding_gets_no_gradient():
    head, h_BLD, labels = head_and_batch(Linear, 8, bias=False)
    expected = torch.autograd.grad(plain(head, h_BLD, labels), h_BLD)
    head.weight.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(head(h_BLD, labels=labels), h_BLD), expected)
