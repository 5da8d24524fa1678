"""Gradients of a linear map's weight, added up over chunks, against autograd's and float64."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from benchmarks.live_bytes import LiveBytes
from nitp_titan.nitp import weight_gradient
from nitp_titan.nitp.weight_gradient import WeightGradient

CHUNKS = 5


def chunks_of_rows(dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """A weight (24, 16), rows (2, 32, 16) of some chunks, and what is to be their outputs' gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = [normal(2, 32, 16).requires_grad_() for _ in range(CHUNKS)]
    return normal(24, 16).requires_grad_(), rows, [normal(2, 32, 24) for _ in range(CHUNKS)]


def added_up(
    weight: torch.Tensor, rows: list[torch.Tensor], grads: list[torch.Tensor], chunks: int = CHUNKS
) -> WeightGradient:
    gradient = WeightGradient(weight, chunks=chunks)
    for h, grad in zip(rows, grads, strict=True):
        output = gradient.linear(h)
        torch.testing.assert_close(output, F.linear(h, weight), rtol=0, atol=0)
        output.backward(grad)
    return gradient


def exact(rows: list[torch.Tensor], grads: list[torch.Tensor]) -> torch.Tensor:
    pairs = zip(rows, grads, strict=True)
    return sum(torch.einsum("scv,scd->vd", grad.double(), h.detach().double()) for h, grad in pairs)


@pytest.fixture
def products_in_fp32(monkeypatch) -> Iterator[list[str]]:
    """CUDA's products of bfloat16 that are added in fp32, on a CPU, with what CUDA asks of them; lists their calls."""
    calls: list[str] = []

    def mm(a, b, out_dtype):
        assert a.dtype == b.dtype
        calls.append("mm")
        return a.to(out_dtype) @ b.to(out_dtype)

    def addmm(total, a, b, out_dtype, *, beta=1, alpha=1, out):
        assert a.dtype == b.dtype
        assert total.dtype in (out_dtype, a.dtype)
        assert out.dtype == out_dtype
        calls.append("addmm")
        return out.copy_(beta * total + alpha * (a.to(out_dtype) @ b.to(out_dtype)))

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("mm.dtype", mm)
    library.impl("addmm.dtype_out", addmm)
    monkeypatch.setattr(weight_gradient, "adds_products_in_fp32", lambda device: True)
    yield calls
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sum_is_autograds(dtype):
    weight, rows, grads = chunks_of_rows(dtype)
    found = added_up(weight, rows, grads)
    pairs = zip(rows, grads, strict=True)
    by_autograd = [torch.autograd.grad(F.linear(h, weight), (h, weight), grad) for h, grad in pairs]
    assert found.total.dtype == dtype
    torch.testing.assert_close(found.total, sum(grad for _, grad in by_autograd))
    for h, (expected, _) in zip(rows, by_autograd, strict=True):
        torch.testing.assert_close(h.grad, expected)
    assert weight.grad is None


def test_sum_of_bf16_is_rounded_a_chunk_at_a_time_where_products_cannot_be_added_in_fp32():
    weight, rows, grads = chunks_of_rows(torch.bfloat16)
    found = added_up(weight, rows, grads).total
    assert found.dtype == torch.float32
    pairs = zip(rows, grads, strict=True)
    expected = sum((grad.flatten(0, 1).T @ h.detach().flatten(0, 1)).float() for h, grad in pairs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_sum_of_bf16_is_that_of_float64_where_products_are_added_in_fp32(products_in_fp32):
    weight, rows, grads = chunks_of_rows(torch.bfloat16)
    found = added_up(weight, rows, grads).total
    assert products_in_fp32 == ["mm", *["addmm"] * (CHUNKS - 1)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact(rows, grads), rtol=1e-5, atol=1e-4)


def test_one_chunk_has_the_weights_dtype(products_in_fp32):
    weight, rows, grads = chunks_of_rows(torch.bfloat16)
    found = added_up(weight, rows[:1], grads[:1], chunks=1).total
    assert (found.dtype, products_in_fp32) == (torch.bfloat16, [])
    torch.testing.assert_close(found.double(), exact(rows[:1], grads[:1]), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_products_are_added_in_fp32():
    weight, rows, grads = chunks_of_rows(torch.bfloat16)
    on_gpu = added_up(
        weight.detach().cuda().requires_grad_(),
        [h.detach().cuda().requires_grad_() for h in rows],
        [grad.cuda() for grad in grads],
    )
    assert on_gpu.total.dtype == torch.float32
    torch.testing.assert_close(on_gpu.total.cpu().double(), exact(rows, grads), rtol=1e-5, atol=1e-4)


def test_a_frozen_weight_has_none():
    weight, rows, grads = chunks_of_rows(torch.float32)
    assert added_up(weight.requires_grad_(False), rows, grads).total is None
    assert all(h.grad is not None for h in rows)


def test_nothing_stays_without_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        weight, rows, grads = chunks_of_rows(torch.float32)
        with LiveBytes([weight, *rows, *grads]) as live:
            gradient = added_up(weight, rows, grads)
            for h in rows:
                h.grad = None
            del gradient
            assert live.now == 0
    finally:
        gc.enable()
