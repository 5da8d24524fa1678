"""Gradient and curvature of the loss against closed forms (PAPER section 2) and finite differences."""

import pytest
import torch
import torch.nn.functional as F

from nitp_titan.nitp.objective import LOSS_KINDS, nitp_loss
from tests.helpers.tensors import randn, some

# --- PAPER section 2: L(h) = 1 - cos(h, z), with r = |h|, u = h / r, v = z / |z|, s = u.v, A = v - s u


def theory(seed, d=7):
    h, z = 3 * randn(d, seed=seed), 5 * randn(d, seed=seed + 100)
    r = h.norm()
    u, v = h / r, z / z.norm()
    s = u @ v
    return h, z, r, u, s, v - s * u


def cosine_loss(z):
    return lambda h: nitp_loss(h, z, torch.tensor(True))


@pytest.mark.parametrize("seed", range(4))
def test_gradient_is_minus_a_over_r(seed):
    h, z, r, _, _, a = theory(seed)
    torch.testing.assert_close(torch.func.grad(cosine_loss(z))(h), -a / r, rtol=0, atol=1e-12)
    h.requires_grad_()
    cosine_loss(z)(h).backward()
    torch.testing.assert_close(h.grad, -a / r, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_hessian_is_that_of_lemma_3_1(seed):
    h, z, r, u, s, a = theory(seed)
    eye = torch.eye(len(h), dtype=torch.float64)
    expected = (s * (eye - torch.outer(u, u)) + torch.outer(u, a) + torch.outer(a, u)) / r**2
    for hessian in (torch.func.hessian(cosine_loss(z))(h), torch.autograd.functional.hessian(cosine_loss(z), h)):
        torch.testing.assert_close(hessian, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_curvature_is_zero_along_h_and_s_over_r_squared_across(seed):
    h, z, r, u, s, _ = theory(seed)
    hessian = torch.func.hessian(cosine_loss(z))(h)
    assert (u @ hessian @ u).item() == pytest.approx(0, abs=1e-13)
    w = randn(len(h), seed=seed + 200)
    w = w - (w @ u) * u
    assert (w @ hessian @ w).item() == pytest.approx((s * (w @ w) / r**2).item(), abs=1e-12)


@pytest.mark.parametrize("lam", [0.6, 1.0])
def test_flat_directions_of_another_loss_are_lifted_by_lambda_s_over_r_squared(lam):
    h, z, r, u, s, _ = theory(3)
    w = randn(len(h), seed=5)
    w = w - (w @ u) * u
    w = w / w.norm()
    data = randn(4, len(h), seed=6)
    data = data - torch.outer(data @ w, w)  # logits that do not move along w

    def ntp(x):
        return F.cross_entropy((data @ x)[None], torch.tensor([2]))

    def total(x):
        return ntp(x) + lam * cosine_loss(z)(x)

    assert (w @ torch.func.hessian(ntp)(h) @ w).item() == pytest.approx(0, abs=1e-14)
    assert (w @ torch.func.hessian(total)(h) @ w).item() == pytest.approx((lam * s / r**2).item(), abs=1e-13)


# --- finite differences


@pytest.mark.parametrize("kind", [kind for kind in LOSS_KINDS if kind != "generic_cosine"])
def test_first_and_second_derivatives_match_finite_differences(kind):
    p, t = randn(2, 3, 4).requires_grad_(), randn(2, 3, 4, seed=1).requires_grad_()
    mask = some(2, 3)
    assert mask.any()
    assert not mask.all()
    assert torch.autograd.gradcheck(lambda p, t: nitp_loss(p, t, mask, kind=kind, stop_gradient=False), (p, t))
    assert torch.autograd.gradgradcheck(lambda p, t: nitp_loss(p, t, mask, kind=kind, stop_gradient=False), (p, t))


def test_derivatives_of_the_generic_cosine_match_finite_differences():
    h = randn(2, 4, 3).requires_grad_()
    mask = torch.tensor([[True, True, False, True], [False, True, False, False]])
    assert torch.autograd.gradcheck(lambda h: nitp_loss(h, None, mask, kind="generic_cosine"), h)
    assert torch.autograd.gradgradcheck(lambda h: nitp_loss(h, None, mask, kind="generic_cosine"), h)
