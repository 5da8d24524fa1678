"""Which positions of packed documents pair with a next token, and the shift, against brute-force loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitp_titan.nitp.objective import next_token_mask, pair_mask, shift_left
from tests.helpers.tensors import ones, randn


def packed(rows):
    """Positions of packed documents, and for each token the document and whether it is that document's last."""
    positions, document, last = [], [], []
    for lengths in rows:
        positions.append([i for n in lengths for i in range(n)])
        document.append([d for d, n in enumerate(lengths) for _ in range(n)])
        last.append([i == n - 1 for n in lengths for i in range(n)])
    return torch.tensor(positions), document, last


@st.composite
def packed_batches(draw):
    """Rows of one length, each cut into documents at random places."""
    length = draw(st.integers(1, 24))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        cuts = sorted(draw(st.sets(st.integers(1, length - 1))) if length > 1 else [])
        rows.append([b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)])
    return rows


@given(packed_batches())
@settings(max_examples=60, deadline=None)
def test_mask_is_true_exactly_where_a_document_has_a_next_token(rows):
    positions, document, last = packed(rows)
    mask = next_token_mask(positions)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[not end for end in row] for row in last]
    for b, row in enumerate(document):
        for t in range(len(row)):
            assert mask[b, t].item() == (t + 1 < len(row) and row[t + 1] == row[t])


@given(packed_batches(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_target_of_every_counted_position_is_the_next_token_of_its_document(rows, seed):
    positions, document, _ = packed(rows)
    b, length = positions.shape
    z = torch.stack([torch.tensor(document, dtype=torch.float64), positions.double(), randn(b, length, seed=seed)], -1)
    shifted, mask = shift_left(z), next_token_mask(positions)
    pairs = 0
    for i in range(b):
        for t in range(length):
            if mask[i, t]:
                pairs += 1
                assert shifted[i, t].tolist() == z[i, t + 1].tolist()
                assert shifted[i, t, :2].tolist() == [document[i][t], positions[i, t] + 1]
    assert pairs == sum(n - 1 for row in rows for n in row)


def test_mask_follows_positions_that_start_in_the_middle_of_a_document():
    positions = torch.tensor([[5, 6, 7, 0, 1, 1, 3, 2]])
    assert next_token_mask(positions).tolist() == [[True, True, False, True, False, False, False, False]]


def test_mask_of_narrow_integers_does_not_wrap_round():
    positions = torch.tensor([[254, 255, 0, 1]], dtype=torch.uint8)
    assert next_token_mask(positions).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("length", [0, 1])
def test_sequences_too_short_for_a_pair_have_none(length):
    positions = torch.zeros(3, length, dtype=torch.int32)
    assert next_token_mask(positions).shape == (3, length)
    assert not next_token_mask(positions).any()
    assert shift_left(torch.ones(3, length, 2)).tolist() == torch.zeros(3, length, 2).tolist()


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), ones(2, 3)])
def test_positions_must_be_a_matrix_of_integers(bad):
    for function in (next_token_mask, pair_mask, lambda positions: pair_mask(positions, shift=0)):
        with pytest.raises(ValueError, match="positions: found"):
            function(bad)


@pytest.mark.parametrize("trailing", [(), (4,), (2, 3)])
def test_shift_moves_left_by_one_for_any_trailing_dims(trailing):
    z = randn(2, 5, *trailing, dtype=torch.bfloat16)
    shifted = shift_left(z)
    assert shifted.dtype == z.dtype
    assert torch.equal(shifted[:, :-1], z[:, 1:])
    assert not shifted[:, -1].any()


def test_gradient_of_the_shift_is_the_shift_to_the_right():
    z = randn(2, 4, 3).requires_grad_()
    weight = randn(2, 4, 3, seed=1)
    (shift_left(z) * weight).sum().backward()
    assert torch.equal(z.grad[:, 1:], weight[:, :-1])
    assert not z.grad[:, 0].any()


def test_shift_of_a_vector_is_an_error():
    with pytest.raises(ValueError, match=r"shift_left: found shape \(3,\)"):
        shift_left(torch.zeros(3))


def test_pair_counts_when_it_has_a_next_token_and_a_label():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    labels = torch.tensor([[-100, 4, 5, 6, 7, 8]])
    assert pair_mask(positions, labels).tolist() == [[False, True, False, True, True, False]]
    assert pair_mask(positions).tolist() == next_token_mask(positions).tolist()
    assert pair_mask(positions, labels, ignore_index=4).tolist() == [[True, False, False, True, True, False]]


def test_same_position_counts_wherever_there_is_a_label():
    positions = torch.tensor([[0, 1, 2, 0]])
    labels = torch.tensor([[-100, 4, 5, 6]])
    assert pair_mask(positions, labels, shift=0).tolist() == [[False, True, True, True]]
    assert pair_mask(positions, shift=0).tolist() == [[True] * 4]


@pytest.mark.parametrize("shift", [-1, 2])
def test_other_shifts_are_an_error(shift):
    with pytest.raises(ValueError, match=f"shift: found {shift}, expected 0"):
        pair_mask(torch.zeros(1, 2, dtype=torch.long), shift=shift)


@pytest.mark.parametrize("shift", [0, 1])
def test_labels_of_another_shape_are_an_error(shift):
    with pytest.raises(ValueError, match=r"labels: found shape \(1, 2\), expected \(1, 3\)"):
        pair_mask(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long), shift=shift)
