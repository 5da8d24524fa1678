"""The unembedding with a loss: values, gradients and memory against the plain computation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torchtitan.models.common.linear import Linear

from nitp_titan.linear_cross_entropy import LossHead, loss_head_config, recomputed_sum


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


def head_and_batch(base: type[Linear], chunk_tokens: int, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = base.Config(in_features=16, out_features=40, bias=True)
    head = loss_head_config(config, chunk_tokens=chunk_tokens).build().to(dtype)
    h_BLD = torch.randn(3, 7, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(40, (3, 7))
    labels[0, 3] = labels[2] = -100
    return head, h_BLD, labels


def plain(head: Linear, h_BLD: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = head(h_BLD).flatten(0, 1).float()
    return F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("base", [Linear, CappedLinear])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 21, 100])
def test_sum_and_gradients_are_those_of_the_whole(base, chunk_tokens):
    head, h_BLD, labels = head_and_batch(base, chunk_tokens)
    inputs = [h_BLD, head.weight, head.bias]
    expected = torch.autograd.grad(0.3 * plain(head, h_BLD, labels), inputs)
    found = head(h_BLD, labels=labels)
    torch.testing.assert_close(found, plain(head, h_BLD, labels))
    for f, e in zip(torch.autograd.grad(0.3 * found, inputs), expected, strict=True):
        torch.testing.assert_close(f, e)


def test_eager_and_recomputed_sums_agree():
    head, h_BLD, labels = head_and_batch(CappedLinear, 4)
    inputs = [h_BLD, head.weight, head.bias]
    eager = head(h_BLD, labels=labels)
    recomputed = recomputed_sum(head._chunk_loss, h_BLD.flatten(0, 1), labels.flatten(), 4)
    torch.testing.assert_close(eager, recomputed)
    pairs = zip(torch.autograd.grad(eager, inputs), torch.autograd.grad(recomputed, inputs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_without_gradients_the_sum_is_the_same():
    head, h_BLD, labels = head_and_batch(Linear, 4)
    with torch.no_grad():
        torch.testing.assert_close(head(h_BLD, labels=labels), plain(head, h_BLD, labels))


@pytest.mark.parametrize("no_grad", [False, True])
def test_logits_exist_a_chunk_at_a_time(monkeypatch, no_grad):
    rows = []
    chunk_loss = LossHead._chunk_loss
    monkeypatch.setattr(LossHead, "_chunk_loss", lambda self, h, y: rows.append(len(h)) or chunk_loss(self, h, y))
    head, h_BLD, labels = head_and_batch(Linear, 5)
    with torch.set_grad_enabled(not no_grad):
        total = head(h_BLD, labels=labels)
    if not no_grad:
        total.backward()
    assert rows == [5, 5, 5, 5, 1]


def test_weight_gradient_of_many_bf16_chunks_is_added_up_in_fp32():
    torch.manual_seed(0)
    head = loss_head_config(Linear.Config(in_features=32, out_features=64), chunk_tokens=16).build().to(torch.bfloat16)
    h_BLD = torch.randn(4, 512, 32, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(64, (4, 512))
    head(h_BLD, labels=labels).backward()
    weight = head.weight.detach().double().requires_grad_()
    logits = h_BLD.detach().double() @ weight.T
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    error = (head.weight.grad.double() - weight.grad).norm() / weight.grad.norm()
    # One rounding of bfloat16 at the end, and those of the logits; 128 roundings would be several times as much.
    assert error < 4e-3
