"""Geometry of hidden states: effective rank and mean cosine similarity (paper section 5), in plain torch.

Shapes are suffixes of names:
    B  batch (sequences)
    L  sequence length
    N  tokens
    P  random pairs of tokens
    D  model dim

Everything is float64: a spectrum near collapse is lost in the rounding of anything less.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nitp_titan.nitp.objective import scaled_rows

__all__ = ["GeometryStatistics", "effective_rank", "mean_cosine_similarity"]


@torch.no_grad()
def effective_rank(h_ND: Tensor) -> Tensor:
    """Return the exponential of the entropy of the covariance spectrum, from 1 (collapse) to min(N - 1, D).

    Rows that are all equal, and fewer than 2 rows, give 1: the limit of collapse. Not finite in, NaN out.

    Args:
        h_ND: hidden states of valid tokens, (N, D).

    Returns:
        0-d, computed in float64; fp32, or float64 for float64 rows.

    Raises:
        ValueError: not 2-D.
    """
    _check_rows(h_ND)
    x_ND = h_ND.double()
    x_ND = x_ND - x_ND.mean(0)
    # X^T X and X X^T have the same non-zero eigenvalues: take the smaller.
    return _rank_of(x_ND @ x_ND.T if len(x_ND) < x_ND.shape[1] else x_ND.T @ x_ND).to(_result_dtype(h_ND))


@torch.no_grad()
def mean_cosine_similarity(h_ND: Tensor, num_pairs: int, generator: torch.Generator | None = None) -> Tensor:
    """Return the mean cosine of random pairs of different rows, a zero row having cosine 0 with every other.

    Args:
        h_ND: hidden states of valid tokens, (N, D).
        num_pairs: pairs drawn, uniformly and independently.
        generator: where the pairs come from, on any device.

    Returns:
        0-d, computed in float64; fp32, or float64 for float64 rows. NaN for fewer than 2 rows.

    Raises:
        ValueError: not 2-D, or ``num_pairs`` below 1.
    """
    _check_rows(h_ND)
    if num_pairs < 1:
        raise ValueError(f"num_pairs: found {num_pairs}, expected at least 1")
    n = len(h_ND)
    if n < 2:
        return torch.full((), torch.nan, dtype=_result_dtype(h_ND), device=h_ND.device)
    device = h_ND.device if generator is None else generator.device
    i_P = torch.randint(n, (num_pairs,), generator=generator, device=device)
    j_P = torch.randint(n - 1, (num_pairs,), generator=generator, device=device)
    j_P += j_P >= i_P  # uniform over the rows other than i
    u_ND = _unit_rows(h_ND.double())
    cosines_P = (u_ND[i_P.to(h_ND.device)] * u_ND[j_P.to(h_ND.device)]).sum(-1)
    return cosines_P.mean().to(_result_dtype(h_ND))


_ROWS = 2048


class GeometryStatistics:
    """Sums from which both metrics follow exactly, accumulated over micro-batches and ranks.

    The mean cosine is over all pairs of different tokens: the expectation of the random-pair estimate of
    ``mean_cosine_similarity``, without its sampling noise. Both metrics depend on the set of tokens alone, not on
    how micro-batches and ranks divide it. NaN or inf in a counted row gives NaN metrics.

    Args:
        dim: D.
        device: where the sums live.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        # One tensor, so that ranks reduce in one collective: counts, sums of rows and unit rows, outer products.
        self._packed = torch.zeros(2 + 2 * dim + dim * dim, dtype=torch.float64, device=device)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return views: count, count of non-zero rows, sum of rows (D), of unit rows (D), of outer products (D, D)."""
        counts, h_D, u_D, outer = self._packed.split([2, self.dim, self.dim, self.dim**2])
        return counts[0], counts[1], h_D, u_D, outer.view(self.dim, self.dim)

    @torch.no_grad()
    def update(self, h_BLD: Tensor, mask_BL: Tensor | None = None) -> None:
        """Add rows.

        Args:
            h_BLD: (..., D), such as (B, L, D) or (N, D).
            mask_BL: (...) bool, the rows to count; None counts all. A row that does not count may hold anything.

        Raises:
            ValueError: another last dim, a mask of another shape or not bool.
        """
        if h_BLD.ndim < 2 or h_BLD.shape[-1] != self.dim:
            raise ValueError(f"rows: found shape {tuple(h_BLD.shape)}, expected (..., {self.dim})")
        if mask_BL is None:
            h_ND = h_BLD.reshape(-1, self.dim)
        elif mask_BL.dtype != torch.bool or mask_BL.shape != h_BLD.shape[:-1]:
            raise ValueError(
                f"mask: found {mask_BL.dtype} of shape {tuple(mask_BL.shape)},"
                f" expected torch.bool of shape {tuple(h_BLD.shape[:-1])}"
            )
        else:
            h_ND = h_BLD[mask_BL]
        count, nonzero, h_D, u_D, outer_DD = self._parts()
        count += len(h_ND)
        # A few rows at a time: their float64 copies come when the activations of a step are all in memory.
        for part_ND in h_ND.split(_ROWS):
            h_ND = part_ND.double()
            u_ND = _unit_rows(h_ND)
            nonzero += (u_ND != 0).any(-1).sum()
            h_D += h_ND.sum(0)
            u_D += u_ND.sum(0)
            outer_DD.addmm_(h_ND.T, h_ND)

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by their sums over ranks: call it once, on every rank, after the last update.

        Args:
            all_reduce: returns the sum over ranks of a flat float64 tensor; called once. It may work in place.
        """
        self._packed = all_reduce(self._packed)

    @property
    def count(self) -> int:
        """Rows that have been counted; waits for the device."""
        return int(self._parts()[0].item())

    @torch.no_grad()
    def effective_rank(self) -> Tensor:
        """Return ``effective_rank`` of all rows, 0-d float64; variance lost in rounding counts as none."""
        count, _, h_D, _, outer_DD = self._parts()
        n = count.clamp(min=1)
        mean_D = h_D / n
        moment_DD = outer_DD / n
        # A sum of n squares is off by up to n eps: of a smaller share of the mean square, variance is noise.
        rounding = (n + 16) * torch.finfo(torch.float64).eps
        return _rank_of(moment_DD - torch.outer(mean_D, mean_D), floor=rounding * moment_DD.trace())

    @torch.no_grad()
    def mean_cosine_similarity(self) -> Tensor:
        """Return the mean cosine over all pairs of different rows, 0-d float64; NaN for fewer than 2 rows."""
        count, nonzero, _, u_D, _ = self._parts()
        # The cosines of all ordered pairs sum to |sum u|^2 - sum |u|^2. Fewer than 2 rows have none: 0 / 0 is NaN.
        pairs = torch.where(count > 1, u_D.square().sum() - nonzero, 0)
        return pairs / (count * (count - 1))


def _rank_of(scatter: Tensor, floor: Tensor | float = 0.0) -> Tensor:
    """Return exp(-sum p log p) over the eigenvalues of a symmetric matrix, those up to ``floor`` taken as 0."""
    finite = scatter.isfinite().all()
    # It raises on NaN, and where it does not converge. A metric must not end a run.
    try:
        eigenvalues = torch.linalg.eigvalsh(torch.where(finite, scatter, 0))
    except torch.linalg.LinAlgError:
        return torch.full((), torch.nan, dtype=scatter.dtype, device=scatter.device)
    eigenvalues = torch.where(eigenvalues > floor, eigenvalues, 0)
    total = eigenvalues.sum()
    p = eigenvalues / torch.where(total > 0, total, 1)
    rank = torch.special.entr(p).sum().exp()  # entr(p) = -p log p, 0 at 0; no variance at all: exp(0) = 1
    return torch.where(finite, rank, torch.nan)


def _result_dtype(h_ND: Tensor) -> torch.dtype:
    return torch.promote_types(h_ND.dtype, torch.float32)


def _unit_rows(h_ND: Tensor) -> Tensor:
    rows_ND, norms_N = scaled_rows(h_ND)
    return rows_ND / norms_N.unsqueeze(-1)


def _check_rows(h_ND: Tensor) -> None:
    if h_ND.ndim != 2:
        raise ValueError(f"rows: found shape {tuple(h_ND.shape)}, expected (N, D)")
