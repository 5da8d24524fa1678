"""Sums by chunks against the sum of the whole: values, gradients, precision, and how often a chunk is computed."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from nitp_titan.nitp.chunked_sum import ChunkedSum, chunks
from tests.helpers.ranks import run_on_ranks

BOTH = pytest.mark.parametrize("implementation", ["fast", "reference"])


def tensors(
    dtype: torch.dtype = torch.float64, shards: int = 2
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Rows (S, 7, 5), two parameters and what else belongs to a row."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    parameters = [normal(5, 3).requires_grad_(), normal(3).requires_grad_()]
    return normal(2, 7, 5).requires_grad_(), parameters, normal(7, 3)


def loss_of(parameters: list[torch.Tensor], other_T3: torch.Tensor):
    weight, bias = parameters

    def chunk_loss(h_SCD: torch.Tensor, chunk: slice) -> torch.Tensor:
        return (torch.tanh(h_SCD @ weight + bias) * other_T3[chunk]).sum().square()

    return chunk_loss


def rows_alone(parameters: list[torch.Tensor], other_T3: torch.Tensor):
    """A loss that is a sum over rows, whatever the chunks are."""
    weight, bias = parameters
    return lambda h_SCD, chunk: (torch.tanh(h_SCD @ weight + bias) * other_T3[chunk]).square().sum()


@pytest.mark.parametrize(
    ("length", "chunk_tokens", "sizes"),
    [
        (8192, 8192, [8192]),
        (100, 8192, [100]),
        (24576, 8192, [8192] * 3),
        (20480, 8192, [5120] * 4),
        (10000, 8192, [5008, 4992]),  # equal ones would be no multiples of 16
        (24592, 8192, [6160, 6160, 6160, 6112]),
        (24, 8, [8] * 3),
        (21, 5, [3] * 7),
        (7, 3, [3, 3, 1]),  # no equal ones among three to five
        (11, 6, [6, 5]),
        (1, 1, [1]),
    ],
)
def test_chunks_are_equal_where_they_can_be(length, chunk_tokens, sizes):
    found = chunks(length, chunk_tokens)
    assert [chunk.stop - chunk.start for chunk in found] == sizes
    assert [row for chunk in found for row in range(length)[chunk]] == list(range(length))


@BOTH
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
def test_sum_and_gradients_are_those_of_the_whole(implementation, chunk_tokens):
    h, parameters, other = tensors()
    whole = rows_alone(parameters, other)(h, slice(None))
    expected = torch.autograd.grad(0.3 * whole, [h, *parameters])
    found = ChunkedSum(chunk_tokens, implementation)(rows_alone(parameters, other), h, parameters)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(0.3 * found, [h, *parameters]), expected)


@BOTH
def test_each_chunk_is_given_its_own_rows(implementation):
    """A loss that is no sum over rows tells which rows came together."""
    h, parameters, other = tensors()
    chunk_loss = loss_of(parameters, other)
    by_hand = sum(chunk_loss(h[:, part], part) for part in (slice(0, 3), slice(3, 6), slice(6, 7)))
    found = ChunkedSum(3, implementation)(chunk_loss, h, parameters)
    torch.testing.assert_close(found, by_hand)
    pairs = [torch.autograd.grad(total, [h, *parameters]) for total in (found, by_hand)]
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize(
    ("implementation", "grad", "times"), [("fast", True, 1), ("reference", True, 2), ("fast", False, 1)]
)
def test_chunks_are_computed_once_or_twice(implementation, grad, times):
    h, parameters, other = tensors()
    inner, seen = rows_alone(parameters, other), []
    with torch.set_grad_enabled(grad):
        total = ChunkedSum(3, implementation)(lambda h, c: seen.append((c.start, c.stop)) or inner(h, c), h, parameters)
    if grad:
        total.backward()
    assert sorted(seen) == sorted(times * [(0, 3), (3, 6), (6, 7)])


def test_fast_keeps_gradients_and_nothing_of_the_chunks():
    h, parameters, other = tensors(torch.float32)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        ChunkedSum(3)(rows_alone(parameters, other), h, parameters)
    # What the chunks' own backward passes keep goes by the same hooks, and is gone by then.
    assert kept[-3:] == [h.shape, *(parameter.shape for parameter in parameters)]
    assert not any(shape[1:2] == (7,) for shape in kept[:-3])


def test_hidden_states_without_a_gradient_are_summed_by_plain_autograd():
    h, parameters, other = tensors()
    total = ChunkedSum(3)(rows_alone(parameters, other), h.detach(), parameters)
    expected = torch.autograd.grad(rows_alone(parameters, other)(h, slice(None)), parameters)
    torch.testing.assert_close(torch.autograd.grad(total, parameters), expected)


@BOTH
def test_frozen_parameters_get_no_gradient(implementation):
    h, parameters, other = tensors()
    parameters[0].requires_grad_(False)
    ChunkedSum(3, implementation)(rows_alone(parameters, other), h, parameters).backward()
    assert parameters[0].grad is None
    assert parameters[1].grad is not None
    assert h.grad is not None


def test_fast_refuses_second_derivatives_and_the_reference_has_them():
    h, parameters, other = tensors()

    def second(total: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(total * h.square().sum(), h, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), h)[0]

    chunk_loss = rows_alone(parameters, other)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        second(ChunkedSum(3)(chunk_loss, h, parameters))
    found = second(ChunkedSum(3, "reference")(chunk_loss, h, parameters))
    torch.testing.assert_close(found, second(chunk_loss(h, slice(None))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_may_share_a_gradient(dtype):
    """autograd gives summands one tensor, and a bias that is summed an expanded one."""
    h, (weight, bias), _ = tensors(dtype)
    other = torch.ones_like(weight, requires_grad=True)

    def chunk_loss(h_SCD: torch.Tensor, chunk: slice) -> torch.Tensor:
        return (h_SCD @ (weight + other)).square().sum() + bias.sum() * (chunk.stop - chunk.start)

    fast, reference = (
        torch.autograd.grad(ChunkedSum(3, way)(chunk_loss, h, [weight, other, bias]), [h, weight, other, bias])
        for way in ("fast", "reference")
    )
    torch.testing.assert_close(fast, reference)


@BOTH
def test_nothing_stays_without_garbage_collection(implementation):
    """A trainer turns Python's own collection off: a cycle that held a chunk's tensors would fill the memory."""
    _, parameters, other = tensors()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            with LiveBytes([*parameters, other]) as live:
                h = torch.zeros(2, 7, 5, dtype=torch.float64).requires_grad_()
                total = ChunkedSum(3, implementation)(rows_alone(parameters, other), h, parameters)
                total.backward()
                for parameter in parameters:
                    parameter.grad = None
                del h, total
                assert live.now == 0
    finally:
        gc.enable()


def test_a_chunks_gradients_do_not_lie_under_the_next_chunks_activations():
    h = torch.zeros(1, 4, 2, device="meta", requires_grad=True)
    weight = torch.zeros(2, 1000, device="meta", requires_grad=True)
    with LiveBytes([h, weight]) as live:
        ChunkedSum(1)(lambda h_SCD, _: (h_SCD @ weight).exp().sum(), h, [weight])
    # The sum of gradients and another's: 2 x 8,000; rows, their exponentials or their gradients: 4,000 each.
    assert live.peak < 2 * 8000 + 2 * 4000


@pytest.mark.parametrize("chunk_tokens", [2, 7])
def test_gradients_have_the_dtypes_of_their_tensors(chunk_tokens):
    h, parameters, other = tensors(torch.bfloat16)
    ChunkedSum(chunk_tokens)(rows_alone(parameters, other), h, parameters).backward()
    assert {tensor.grad.dtype for tensor in (h, *parameters)} == {torch.bfloat16}


def test_gradients_of_parameters_are_added_up_in_fp32():
    h = torch.ones(1, 4096, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    ChunkedSum(1)(lambda h, _: (h * weight).sum(), h, [weight]).backward()
    # In bfloat16 256 + 1 is 256.
    assert weight.grad.item() == 4096


def partial_gradients(implementation: str) -> list[torch.Tensor]:
    """Columns of a weight over two ranks: each has its part of the hidden states' gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    h, (weight, _), other = tensors()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    wide = torch.cat([weight, -2 * weight], dim=1).detach()
    weight = torch.nn.Parameter(distribute_tensor(wide, mesh, [Shard(1)]))
    h = DTensor.from_local(h.detach(), mesh, [Replicate()]).requires_grad_()

    def chunk_loss(h_SCD: torch.Tensor, chunk: slice) -> torch.Tensor:
        product = torch.tanh(h_SCD @ weight).redistribute(placements=[Replicate()]).to_local()
        return (product * torch.cat([other, other], dim=1)[chunk]).square().sum()

    total = ChunkedSum(3, implementation)(chunk_loss, h, [weight])
    total.backward()
    return [total.detach(), h.grad.full_tensor(), weight.grad.full_tensor()]


def test_sharded_parameters_have_the_gradients_of_whole_ones():
    h, (weight, _), other = tensors()
    wide = torch.cat([weight, -2 * weight], dim=1).detach().requires_grad_()
    total = (torch.tanh(h @ wide) * torch.cat([other, other], dim=1)).square().sum()
    expected = [total.detach(), *torch.autograd.grad(total, [h, wide])]
    for implementation in ("fast", "reference"):
        for rank in run_on_ranks(2, partial_gradients, implementation):
            torch.testing.assert_close(rank, expected)
