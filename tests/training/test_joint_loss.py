"""The joint loss against its formula, and the metric channel."""

import pytest
import torch

from nitp_titan.training.joint_loss import JointLoss


def begun(weight: float, pairs: float) -> JointLoss:
    loss = JointLoss.Config(weight=weight).build(compile_config=None)
    loss.begin_step(torch.tensor(pairs))
    return loss


def test_total_is_ntp_plus_weight_times_nitp_each_over_its_own_count():
    loss = begun(0.5, 20.0)
    total, metrics = loss(torch.tensor([[100.0, 10.0]]), None, torch.tensor(40))
    assert total.item() == pytest.approx(100 / 40 + 0.5 * 10 / 20)
    assert metrics == {}


def test_micro_batches_add_up_to_the_step():
    loss = begun(1.0, 20.0)
    totals = [loss(torch.tensor([sums]), None, torch.tensor(40))[0] for sums in ([60.0, 4.0], [40.0, 6.0])]
    assert sum(totals).item() == pytest.approx(100 / 40 + 10 / 20)
    assert loss.parts.tolist() == pytest.approx([100 / 40, 10 / 20])


def test_gradient_reaches_both_sums():
    loss = begun(0.5, 20.0)
    sums = torch.tensor([[100.0, 10.0]], requires_grad=True)
    loss(sums, None, torch.tensor(40))[0].backward()
    assert sums.grad.tolist() == [pytest.approx([1 / 40, 0.5 / 20])]


def test_a_step_without_pairs_has_no_nitp_loss():
    loss = begun(1.0, 0.0)
    total, _ = loss(torch.tensor([[100.0, 0.0]]), None, torch.tensor(40))
    assert total.item() == pytest.approx(100 / 40)


def test_a_step_without_labels_has_no_loss_and_finite_gradients():
    loss = begun(1.0, 0.0)
    sums = torch.tensor([[0.0, 0.0]], requires_grad=True)
    total, _ = loss(sums, None, torch.tensor(0))
    total.backward()
    assert total.item() == 0
    assert loss.parts.tolist() == [0, 0]
    assert sums.grad.isfinite().all()


def test_a_new_step_forgets_the_last_and_keeps_its_storage():
    loss = begun(1.0, 20.0)
    loss(torch.tensor([[100.0, 10.0]]), None, torch.tensor(40))
    address = loss.parts.data_ptr()
    loss.begin_step(torch.tensor(5.0))
    assert loss.parts.tolist() == [0, 0]
    assert loss.parts.data_ptr() == address


def test_validation_gets_the_ntp_sum_and_keeps_both():
    loss = begun(1.0, 0.0)
    returned, _ = loss(torch.tensor([[100.0, 10.0]]), None)
    assert returned.item() == 100
    assert loss.parts.tolist() == [100, 10]
