"""The objective against closed forms (PAPER section 1) and brute-force loops."""

import math

import pytest
import torch
from torch import nn

from nitp_titan.nitp import config as nitp_config
from nitp_titan.nitp import objective
from nitp_titan.nitp.objective import NITPConfig, Projector, nitp_loss, pair_mask, scaled_rows, shift_left
from tests.helpers.tensors import ones, randn, some

PAIR_KINDS = ("cosine", "mse", "smooth_l1", "kl")
KINDS = (*PAIR_KINDS, "generic_cosine")


def distance(kind, p, t):
    """One position, in Python floats."""
    p, t = p.tolist(), t.tolist()
    if kind == "cosine":
        return 1 - sum(a * b for a, b in zip(p, t, strict=True)) / (math.hypot(*p) * math.hypot(*t))
    if kind == "mse":
        return sum((a - b) ** 2 for a, b in zip(p, t, strict=True)) / len(p)
    if kind == "smooth_l1":
        gaps = [abs(a - b) for a, b in zip(p, t, strict=True)]
        return sum(g * g / 2 if g < 1 else g - 0.5 for g in gaps) / len(p)
    zp, zt = sum(map(math.exp, p)), sum(map(math.exp, t))
    return sum(math.exp(b) / zt * math.log((math.exp(b) / zt) / (math.exp(a) / zp)) for a, b in zip(p, t, strict=True))


def generic_cosine_loop(h_BLD, mask_BL):
    """O(L^2): for each counted token the mean cosine with every other counted token of its sequence."""
    total = 0.0
    for h_LD, mask_L in zip(h_BLD, mask_BL, strict=True):
        rows = [row for row, keep in zip(h_LD, mask_L, strict=True) if keep]
        for i, a in enumerate(rows):
            others = [1 - distance("cosine", a, b) for j, b in enumerate(rows) if j != i]
            total += sum(others) / len(others) if others else 0.0
    return total


# --- the projector


def test_projector_is_a_swiglu_mlp_of_three_times_ratio_times_d_squared_parameters():
    projector = Projector(6, ratio=2).double()
    assert sum(p.numel() for p in projector.parameters()) == 3 * 2 * 6 * 6
    assert sum(p.numel() for p in Projector(8).parameters()) == 12 * 8 * 8  # paper section 1
    assert sorted(projector.state_dict()) == ["w1.weight", "w2.weight", "w3.weight"]
    gate, down, up = (projector.get_parameter(f"w{i}.weight") for i in (1, 2, 3))
    h = randn(2, 5, 6)
    a = h @ gate.T
    torch.testing.assert_close(projector(h), (a * torch.sigmoid(a) * (h @ up.T)) @ down.T, rtol=0, atol=1e-12)
    assert isinstance(projector, nn.Module)
    assert projector(h[0, 0]).shape == (6,)


@pytest.mark.parametrize(("d", "ratio"), [(0, 4), (8, 0)])
def test_projector_sizes_below_one_are_an_error(d, ratio):
    with pytest.raises(ValueError, match=f"d={d}, ratio={ratio}"):
        Projector(d, ratio)


# --- values of the loss


@pytest.mark.parametrize("kind", PAIR_KINDS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5)])
def test_loss_is_the_sum_of_distances_over_true_positions(kind, shape):
    p, t = 2 * randn(*shape), 2 * randn(*shape, seed=1)
    mask = some(*shape[:-1]) if len(shape) > 1 else torch.tensor(True)
    rows = zip(p.reshape(-1, 5), t.reshape(-1, 5), mask.flatten(), strict=True)
    expected = sum(distance(kind, a, b) for a, b, keep in rows if keep)
    loss = nitp_loss(p, t, mask, kind=kind)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_default_kind_is_cosine():
    p, t, mask = randn(2, 3, 5), randn(2, 3, 5, seed=1), ones(2, 3)
    assert nitp_loss(p, t, mask) == nitp_loss(p, t, mask, kind="cosine")


def test_cosine_of_equal_opposite_and_orthogonal_vectors():
    p = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    t = torch.tensor([[6.0, 8.0], [-3.0, -4.0], [4.0, -3.0]], dtype=torch.float64)
    for i, expected in enumerate((0.0, 2.0, 1.0)):
        assert nitp_loss(p[i], t[i], torch.tensor(True)).item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5), (2, 2, 6, 5)])
def test_generic_cosine_is_the_mean_cosine_with_the_other_tokens_of_the_sequence(shape):
    h, mask = randn(*shape), some(*shape[:-1])
    expected = generic_cosine_loop(h.reshape(-1, 6, 5), mask.reshape(-1, 6))
    assert nitp_loss(h, None, mask, kind="generic_cosine").item() == pytest.approx(expected, rel=1e-12)


def test_generic_cosine_of_fewer_than_two_tokens_is_zero():
    h = randn(3, 4, 5).requires_grad_()
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 2] = True
    loss = nitp_loss(h, None, mask, kind="generic_cosine")
    loss.backward()
    assert loss.item() == 0
    assert not h.grad.any()


def test_generic_cosine_ignores_the_target():
    h, mask = randn(2, 4, 5), some(2, 4)
    loss = nitp_loss(h, None, mask, kind="generic_cosine")
    assert nitp_loss(h, torch.full((3, 1), torch.nan), mask, kind="generic_cosine") == loss


def test_equal_tokens_of_a_sequence_have_generic_cosine_one_each():
    h = torch.ones(2, 4, 5, dtype=torch.float64) * torch.tensor([1.0, 7.0])[:, None, None]
    assert nitp_loss(h, None, ones(2, 4), kind="generic_cosine").item() == pytest.approx(8, rel=1e-14)


# --- gradients


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_target_is_a_constant_unless_it_is_asked_for(kind):
    p, t, mask = randn(2, 3, 4).requires_grad_(), randn(2, 3, 4, seed=1).requires_grad_(), ones(2, 3)
    nitp_loss(p, t, mask, kind=kind).backward()
    assert t.grad is None
    constant, p.grad = p.grad, None
    nitp_loss(p, t, mask, kind=kind, stop_gradient=False).backward()
    assert t.grad.abs().sum() > 0
    assert torch.equal(p.grad, constant)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_out_positions_have_no_influence_whatever_they_hold(kind, poison, dtype):
    mask = some(3, 6)
    assert not mask.all()
    results = []
    for fill in (0.5, poison):
        p, t = (randn(3, 6, 4, seed=s, dtype=dtype) for s in (0, 1))
        p[~mask], t[~mask] = fill, fill
        p.requires_grad_()
        t.requires_grad_()
        loss = nitp_loss(p, t, mask, kind=kind, stop_gradient=False)
        loss.backward()
        grads = [x.grad for x in (p, t) if x.grad is not None]
        assert len(grads) == (1 if kind == "generic_cosine" else 2)
        assert loss.isfinite()
        for grad in grads:
            assert not grad[~mask].any()
            assert grad[mask].isfinite().all()
        results.append([loss, *grads])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_not_finite_at_a_counted_position_shows_in_the_loss(kind, poison):
    p = randn(2, 3, 4)
    p[1, 1, 2] = poison
    assert not nitp_loss(p, randn(2, 3, 4, seed=1), ones(2, 3), kind=kind).isfinite()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 0, 4), (0, 3, 4)])
def test_empty_mask_gives_zero_with_a_graph(kind, shape):
    p, t = randn(*shape).requires_grad_(), randn(*shape, seed=1)
    loss = nitp_loss(p, t, torch.zeros(*shape[:-1], dtype=torch.bool), kind=kind)
    loss.backward()
    assert loss.item() == 0
    assert p.grad.shape == p.shape
    assert not p.grad.any()


# --- degenerate and extreme vectors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiny", [0.0, 1e-39])  # 1e-39: 1 / r overflows float32
def test_zero_vectors_have_cosine_zero_and_no_gradient(dtype, tiny):
    if dtype == torch.float64 and tiny:
        tiny = 1e-309
    p, t = randn(2, 3, 4, dtype=dtype), randn(2, 3, 4, seed=1, dtype=dtype)
    p[0, 1], t[1, 2] = tiny, tiny
    p.requires_grad_()
    t.requires_grad_()
    loss = nitp_loss(p, t, ones(2, 3), stop_gradient=False)
    loss.backward()
    regular = ones(2, 3)
    regular[0, 1] = regular[1, 2] = False
    expected = 2 + nitp_loss(p, t, regular)
    torch.testing.assert_close(loss, expected)
    for grad in (p.grad, t.grad):  # a pair with a zero vector is at cos = 0 whatever the other vector does
        assert not grad[~regular].any()
        assert grad[regular].isfinite().all()
        assert grad.abs().max() < 1e3


def test_zero_tokens_of_the_generic_cosine_count_as_orthogonal():
    h = randn(1, 3, 4)
    h[0, 1] = 0
    h.requires_grad_()
    loss = nitp_loss(h, None, ones(1, 3), kind="generic_cosine")
    loss.backward()
    assert loss.item() == pytest.approx(1 - distance("cosine", h[0, 0].detach(), h[0, 2].detach()), rel=1e-12)
    assert not h.grad[0, 1].any()
    assert h.grad.abs().max() < 10


@pytest.mark.parametrize("p_scale", [1e-30, 1e-20, 1.0, 1e20, 1e38])
@pytest.mark.parametrize("t_scale", [1e-20, 1e20])
def test_cosine_is_right_for_norms_whose_squares_leave_float32(p_scale, t_scale):
    p, t = (randn(1, 1, 8, seed=s, dtype=torch.float32) / 4 for s in (0, 1))
    big, other = (p * p_scale).requires_grad_(), t * t_scale
    loss = nitp_loss(big, other, ones(1, 1))
    loss.backward()
    exact = p.double().requires_grad_()
    nitp_loss(exact, t.double(), ones(1, 1)).backward()
    assert loss.item() == pytest.approx(distance("cosine", p[0, 0], t[0, 0]), abs=1e-6)
    assert (big.grad.double() * p_scale - exact.grad).abs().max() < 1e-6


def test_scaled_rows_are_unit_vectors_times_their_norms():
    x = torch.stack([randn(5), 1e200 * randn(5), 1e-200 * randn(5), torch.zeros(5)])
    rows, norms = scaled_rows(x)
    assert torch.equal(norms[3], torch.tensor(1.0, dtype=torch.float64))
    units = rows / norms[:, None]
    for i in range(3):
        torch.testing.assert_close(units[i], randn(5) / randn(5).norm(), rtol=0, atol=1e-14)
    assert not units[3].any()


# --- dtypes, errors, compilation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(kind, dtype):
    p, t, mask = randn(4, 33, 16, dtype=dtype), randn(4, 33, 16, seed=1, dtype=dtype), some(4, 33)
    exact = nitp_loss(p.double(), t.double(), mask, kind=kind)
    p.requires_grad_()
    loss = nitp_loss(p, t, mask, kind=kind)
    loss.backward()
    assert loss.dtype == torch.float32
    assert p.grad.dtype == dtype
    # The inputs are the same numbers: only float32 rounding separates the two, not that of the inputs' dtype.
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5)


def test_one_float64_input_makes_the_loss_float64():
    p, t = randn(2, 3, 4), randn(2, 3, 4, seed=1, dtype=torch.float32)
    assert nitp_loss(p, t, ones(2, 3)).dtype == torch.float64
    assert nitp_loss(t, p, ones(2, 3)).dtype == torch.float64


def test_unknown_kind_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"'cosin'.*generic_cosine; nearest: 'cosine'") as error:
        nitp_loss(randn(2, 3), randn(2, 3), ones(2), kind="cosin")
    for kind in KINDS:
        assert kind in str(error.value)


@pytest.mark.parametrize("kind", PAIR_KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 4), (4,)])  # the last two would broadcast
def test_target_of_another_shape_is_an_error(kind, shape):
    with pytest.raises(ValueError, match=r"target: found shape .*, expected \(2, 3, 4\)"):
        nitp_loss(randn(2, 3, 4), torch.zeros(shape), ones(2, 3), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2,), (3,), (2, 1), (2, 3, 4)])
def test_mask_of_another_shape_is_an_error(kind, shape):
    with pytest.raises(ValueError, match=r"mask: found shape .*\(2, 3, 4\)"):
        nitp_loss(randn(2, 3, 4), randn(2, 3, 4), ones(*shape), kind=kind)


def test_mask_must_be_bool():
    with pytest.raises(ValueError, match=r"mask: found torch\.float32"):
        nitp_loss(randn(2, 3, 4), randn(2, 3, 4), torch.ones(2, 3))


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_missing_target_is_an_error(kind):
    with pytest.raises(ValueError, match=f"target: found None.*'{kind}'"):
        nitp_loss(randn(2, 3), None, ones(2), kind=kind)


def test_generic_cosine_of_a_single_vector_is_an_error():
    with pytest.raises(ValueError, match=r"prediction: found shape \(4,\)"):
        nitp_loss(randn(4), None, torch.tensor(True), kind="generic_cosine")


@pytest.mark.parametrize("kind", KINDS)
def test_objective_compiles_into_one_graph(kind):
    def step(h, z, positions, labels):
        return nitp_loss(h, shift_left(z), pair_mask(positions, labels), kind=kind)

    h, z = randn(2, 5, 4).requires_grad_(), randn(2, 5, 4, seed=1)
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 1, 2]])
    labels = torch.tensor([[1, 2, 3, 4, 5], [-100, 2, 3, 4, 5]])
    expected = step(h, z, positions, labels)
    (grad,) = torch.autograd.grad(expected, h)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(h, z, positions, labels)
    (compiled_grad,) = torch.autograd.grad(compiled, h)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(compiled_grad, grad)


def test_config_is_re_exported():
    assert NITPConfig is nitp_config.NITPConfig
    assert "NITPConfig" in objective.__all__
    assert set(KINDS) == set(objective.LOSS_KINDS)
