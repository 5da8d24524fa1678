"""Geometry metrics against spectra and cosines known in closed form."""

import math

import pytest
import torch

from nitp_titan.nitp.geometry import GeometryStatistics, effective_rank, mean_cosine_similarity


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(randn(d, d, seed=seed)).Q


def with_spectrum(variances, dim=None):
    """Rows +sqrt(v_i) e_i and -sqrt(v_i) e_i: mean zero, covariance proportional to diag(v)."""
    half = torch.tensor(variances, dtype=torch.float64).sqrt().diag()
    rows = torch.cat([half, -half])
    return torch.nn.functional.pad(rows, (0, (dim or len(variances)) - len(variances)))


def rank_of(variances):
    total = sum(variances)
    return math.exp(-sum(v / total * math.log(v / total) for v in variances if v > 0))


def mean_cosine_loop(rows):
    cosines = []
    for i, a in enumerate(rows.tolist()):
        for j, b in enumerate(rows.tolist()):
            if i != j:
                norm = math.hypot(*a) * math.hypot(*b)
                cosines.append(sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0)
    return sum(cosines) / len(cosines)


def statistics_of(rows, *args):
    statistics = GeometryStatistics(rows.shape[-1], "cpu")
    statistics.update(rows, *args)
    return statistics


def rank_by_statistics(rows):
    return statistics_of(rows).effective_rank()


both_ranks = pytest.mark.parametrize("rank", [effective_rank, rank_by_statistics])


# --- effective rank


@both_ranks
@pytest.mark.parametrize("d", [1, 2, 7, 32])
def test_isotropic_rows_have_the_rank_of_the_space(rank, d):
    assert rank(with_spectrum([1.0] * d)).item() == pytest.approx(d, rel=1e-12)


@both_ranks
def test_rows_on_a_line_have_rank_one(rank):
    rows = torch.outer(randn(20), randn(8, seed=1)) + randn(8, seed=2)
    assert rank(rows).item() == pytest.approx(1, abs=1e-9)


@both_ranks
@pytest.mark.parametrize(
    "variances", [[4.0] * 3 + [0.25] * 5, [1.0, 0.5, 0.0, 0.0], [100.0, 1e-3], [1.0, 1e-9], [3.0, 2.0, 1.0]]
)
def test_rank_is_the_exponential_of_the_entropy_of_the_spectrum(rank, variances):
    assert rank(with_spectrum(variances, dim=10)).item() == pytest.approx(rank_of(variances), rel=1e-10)


def test_two_level_spectrum_has_a_rank_of_closed_form():
    # k directions share the fraction q of the variance, m the rest: (k / q)^q (m / (1 - q))^(1 - q)
    k, m, q = 3, 5, 0.8
    rows = with_spectrum([q / k] * k + [(1 - q) / m] * m)
    assert effective_rank(rows).item() == pytest.approx((k / q) ** q * (m / (1 - q)) ** (1 - q), rel=1e-12)


@both_ranks
def test_rank_does_not_change_with_rotation_scale_and_translation(rank):
    rows = randn(40, 6) * torch.tensor([5.0, 3.0, 1.0, 1.0, 0.3, 0.1])
    expected = rank(rows).item()
    assert 1.5 < expected < 5
    for moved in (rows @ rotation(6, seed=3), 1e-4 * rows, 1e6 * rows, rows + 20 * randn(6, seed=4), rows.flip(0)):
        assert rank(moved).item() == pytest.approx(expected, rel=1e-9)


def test_rank_of_fewer_rows_than_dims_does_not_depend_on_the_matrix_used():
    rows = randn(9, 6) * torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.1])
    wide = torch.nn.functional.pad(rows, (0, 30)) @ rotation(36)  # the same points in a larger space
    assert effective_rank(wide).item() == pytest.approx(effective_rank(rows).item(), rel=1e-10)
    assert rank_by_statistics(wide).item() == pytest.approx(effective_rank(rows).item(), rel=1e-9)


def test_large_wide_input_is_decomposed_in_its_small_dimension(monkeypatch):
    sizes = []
    eigvalsh = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda a: sizes.append(a.shape[0]) or eigvalsh(a))
    effective_rank(randn(4, 50))
    effective_rank(randn(50, 4))
    assert sizes == [4, 4]


@both_ranks
@pytest.mark.parametrize("n", [0, 1, 2, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e3])
def test_equal_rows_and_fewer_than_two_rows_have_rank_one(rank, n, value):
    rows = (value * (1 + randn(1, 5))).expand(n, 5)
    result = rank(rows)
    assert result.shape == ()
    assert result.dtype == torch.float64
    assert result.item() == pytest.approx(1, abs=1e-9)


def test_rounding_of_long_sums_does_not_pass_for_variance():
    statistics = GeometryStatistics(64, "cpu")
    row = randn(64)
    for _ in range(100):
        statistics.update(row.expand(1000, 64))
    assert statistics.effective_rank().item() == pytest.approx(1, abs=1e-9)


@both_ranks
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(10, 4), (3, 8)])
def test_rank_of_rows_that_are_not_finite_is_nan(rank, value, shape):
    rows = randn(*shape)
    rows[1, 2] = value
    assert rank(rows).isnan()


@both_ranks
def test_low_precision_rows_are_computed_in_float64(rank):
    rows = (randn(30, 5) + 8).bfloat16()
    assert rank(rows).item() == pytest.approx(rank(rows.double()).item(), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_results_are_in_fp32_unless_the_rows_are_float64(dtype):
    rows = randn(30, 5).to(dtype)
    expected = torch.promote_types(dtype, torch.float32)
    assert effective_rank(rows).dtype == mean_cosine_similarity(rows, 4).dtype == expected


def test_metrics_need_no_graph():
    rows = randn(30, 5).requires_grad_()
    statistics = statistics_of(rows)
    for metric in (
        effective_rank(rows),
        mean_cosine_similarity(rows, 4),
        statistics.effective_rank(),
        statistics.mean_cosine_similarity(),
    ):
        assert not metric.requires_grad


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_rows_must_be_a_matrix(shape):
    with pytest.raises(ValueError, match="expected \\(N, D\\)"):
        effective_rank(torch.zeros(shape))
    with pytest.raises(ValueError, match="expected \\(N, D\\)"):
        mean_cosine_similarity(torch.zeros(shape), 4)


# --- mean cosine similarity


def test_two_rows_have_their_own_cosine():
    rows = torch.tensor([[3.0, 4.0], [4.0, 3.0]], dtype=torch.float64)
    assert mean_cosine_similarity(rows, 50, generator()).item() == pytest.approx(24 / 25, rel=1e-12)
    assert statistics_of(rows).mean_cosine_similarity().item() == pytest.approx(24 / 25, rel=1e-12)


def test_a_row_is_never_paired_with_itself():
    rows = torch.eye(3)
    assert mean_cosine_similarity(rows, 500, generator()).item() == 0
    assert statistics_of(rows).mean_cosine_similarity().item() == pytest.approx(0, abs=1e-15)


def test_every_pair_of_different_rows_is_drawn_as_often_as_another():
    # Cosines of (0,1), (0,2), (1,2) are 1, 0, 0: the mean is the share of draws of the first pair.
    for order in ([0, 1, 2], [0, 2, 1], [2, 0, 1]):
        rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])[order]
        assert mean_cosine_similarity(rows, 30000, generator()).item() == pytest.approx(1 / 3, abs=0.015)


def test_estimate_converges_to_the_exact_mean_over_all_pairs():
    rows = randn(12, 4) + 1.5
    exact = mean_cosine_loop(rows)
    assert exact > 0.2
    assert statistics_of(rows).mean_cosine_similarity().item() == pytest.approx(exact, rel=1e-12)
    errors = [abs(mean_cosine_similarity(rows, pairs, generator(3)).item() - exact) for pairs in (100, 100000)]
    assert errors[0] < 0.2
    assert errors[1] < 0.006


def test_length_of_rows_does_not_matter_for_the_cosine():
    rows = randn(12, 4)
    scaled = rows * torch.logspace(-30, 30, 12, dtype=torch.float64)[:, None]
    for metric in (
        lambda r: mean_cosine_similarity(r, 100, generator()),
        lambda r: statistics_of(r).mean_cosine_similarity(),
    ):
        assert metric(scaled).item() == pytest.approx(metric(rows).item(), rel=1e-12)


def test_rank_that_cannot_be_computed_is_nan(monkeypatch):
    def not_converging(matrix):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", not_converging)
    found = effective_rank(torch.randn(5, 3))
    assert found.isnan()
    assert (found.shape, found.dtype) == ((), torch.float32)


def test_zero_rows_have_cosine_zero_with_every_other():
    rows = torch.cat([torch.ones(3, 2), torch.zeros(3, 2)])
    expected = 3 * 2 / (6 * 5)
    assert mean_cosine_loop(rows) == pytest.approx(expected, rel=1e-12)
    assert statistics_of(rows).mean_cosine_similarity().item() == pytest.approx(expected, rel=1e-12)
    assert mean_cosine_similarity(rows, 30000, generator()).item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("n", [0, 1])
def test_mean_cosine_of_fewer_than_two_rows_is_nan(n):
    assert mean_cosine_similarity(torch.ones(n, 3), 4).isnan()
    assert statistics_of(torch.ones(n, 3)).mean_cosine_similarity().isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_mean_cosine_of_rows_that_are_not_finite_is_nan(value):
    rows = torch.ones(4, 3)
    rows[2, 1] = value
    assert mean_cosine_similarity(rows, 100, generator()).isnan()
    assert statistics_of(rows).mean_cosine_similarity().isnan()


def test_the_generator_decides_the_pairs():
    rows = randn(50, 4)
    first, again, other = (mean_cosine_similarity(rows, 20, generator(s)) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.dtype == torch.float64


def test_fewer_than_one_pair_is_an_error():
    with pytest.raises(ValueError, match="num_pairs: found 0"):
        mean_cosine_similarity(torch.ones(4, 3), 0)


# --- accumulated statistics


def test_chunks_and_ranks_add_up_to_the_whole():
    rows = randn(60, 5) + 1
    rows[7] = 0
    whole = statistics_of(rows)
    ranks = [GeometryStatistics(5, "cpu") for _ in range(3)]
    for i, chunk in enumerate(rows.split([1, 9, 20, 5, 25])):
        ranks[i % 3].update(chunk)
    others = []
    ranks[1].reduce(lambda packed: others.append(packed.clone()) or packed)
    ranks[2].reduce(lambda packed: others.append(packed.clone()) or packed)
    calls = []

    def all_reduce(packed):
        calls.append(packed.shape)
        return packed + sum(others)

    ranks[0].reduce(all_reduce)
    assert len(calls) == 1
    assert len(calls[0]) == 1
    assert ranks[0].effective_rank().item() == pytest.approx(whole.effective_rank().item(), rel=1e-12)
    assert ranks[0].effective_rank().item() == pytest.approx(effective_rank(rows).item(), rel=1e-10)
    cosine = ranks[0].mean_cosine_similarity().item()
    assert cosine == pytest.approx(whole.mean_cosine_similarity().item(), rel=1e-12)
    assert cosine == pytest.approx(mean_cosine_loop(rows), rel=1e-12)


def test_reduction_in_place_works_too():
    statistics = statistics_of(randn(10, 3))
    before = statistics.effective_rank().item(), statistics.mean_cosine_similarity().item()
    statistics.reduce(lambda packed: packed.mul_(2))  # two ranks with the same rows
    assert statistics.effective_rank().item() == pytest.approx(before[0], rel=1e-12)
    # Of 20 * 19 ordered pairs 20 are a row and its copy, with cosine 1.
    expected = (4 * before[1] * 10 * 9 + 20) / (20 * 19)
    assert statistics.mean_cosine_similarity().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("poison", [1e6, math.nan, math.inf])
def test_rows_masked_out_do_not_count(poison):
    h = randn(2, 6, 3) + 0.5
    mask = torch.rand(2, 6, generator=generator(5)) < 0.7
    assert not mask.all()
    h[~mask] = poison
    statistics = statistics_of(h, mask)
    assert statistics.effective_rank().item() == pytest.approx(effective_rank(h[mask]).item(), rel=1e-10)
    assert statistics.mean_cosine_similarity().item() == pytest.approx(mean_cosine_loop(h[mask]), rel=1e-12)


def test_a_batch_without_a_mask_counts_every_token():
    h = randn(2, 6, 3)
    assert statistics_of(h).effective_rank().item() == pytest.approx(effective_rank(h.reshape(12, 3)).item(), rel=1e-10)


def test_an_empty_update_changes_nothing():
    statistics = statistics_of(randn(10, 3))
    before = statistics.effective_rank(), statistics.mean_cosine_similarity()
    statistics.update(torch.full((2, 4, 3), math.nan), torch.zeros(2, 4, dtype=torch.bool))
    assert (statistics.effective_rank(), statistics.mean_cosine_similarity()) == before


def test_one_rank_with_nan_makes_the_metrics_nan():
    statistics = statistics_of(randn(10, 3))
    statistics.update(torch.full((1, 3), math.nan))
    assert statistics.effective_rank().isnan()
    assert statistics.mean_cosine_similarity().isnan()


@pytest.mark.parametrize("shape", [(3,), (4, 5), (2, 4, 5)])
def test_rows_of_another_width_are_an_error(shape):
    with pytest.raises(ValueError, match="expected \\(\\.\\.\\., 3\\)"):
        GeometryStatistics(3, "cpu").update(torch.zeros(shape))


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.ones(2, dtype=torch.bool), torch.ones(8, dtype=torch.bool)])
def test_mask_of_another_type_or_shape_is_an_error(mask):
    with pytest.raises(ValueError, match="mask: found"):
        GeometryStatistics(3, "cpu").update(torch.zeros(2, 4, 3), mask)
