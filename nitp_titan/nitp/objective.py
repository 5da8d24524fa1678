"""The mathematics of Next Implicit Token Prediction, in plain torch: projector, shift, masks, losses.

Shapes are suffixes of names:
    B  batch (sequences)
    L  sequence length (tokens; several documents may be packed in one row)
    D  model dim
    F  hidden dim of the projector
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_titan.nitp.config import LOSS_KINDS, REGULARISER, LossKind, NITPConfig

__all__ = [
    "NITPConfig",
    "Projector",
    "next_token_mask",
    "nitp_loss",
    "pair_mask",
    "scaled_rows",
    "shift_left",
]


class Projector(nn.Module):
    """Two-layer SwiGLU MLP from hidden states to predicted implicit tokens (paper section 1), without biases.

    ``(..., D) -> (..., D)``; 3 * ratio * D^2 parameters. Training only: an exported model has none.
    The names are those of a SwiGLU feed-forward block (w1 gate, w2 down, w3 up), so weights interchange.

    Raises:
        ValueError: ``d`` or ``ratio`` below 1.
    """

    def __init__(self, d: int, ratio: int = 4) -> None:
        super().__init__()
        if d < 1 or ratio < 1:
            raise ValueError(f"Projector: found d={d}, ratio={ratio}, expected both to be at least 1")
        self.w1 = nn.Linear(d, ratio * d, bias=False)
        self.w2 = nn.Linear(ratio * d, d, bias=False)
        self.w3 = nn.Linear(d, ratio * d, bias=False)

    def forward(self, h_D: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(h_D)) * self.w3(h_D))


def next_token_mask(positions_BL: Tensor) -> Tensor:
    """Return where a token's successor belongs to the same document (paper fig. 2: the last position has no target).

    Positions restart at every packed document, so t and t + 1 are of one document exactly when
    ``positions[t + 1] == positions[t] + 1``.

    Args:
        positions_BL: integers, (B, L).

    Returns:
        (B, L) bool; the last column is False.

    Raises:
        ValueError: not a 2-D integer tensor.
    """
    _check_positions(positions_BL)
    positions_BL = positions_BL.long()  # a narrow integer type would wrap round at its end, where documents may restart
    follows_BL = positions_BL[:, 1:] == positions_BL[:, :-1] + 1
    return torch.cat([follows_BL, torch.zeros_like(positions_BL[:, :1], dtype=torch.bool)], dim=1)


def shift_left(z_BLD: Tensor) -> Tensor:
    """Move each sequence one position to the left: row t holds z[t + 1] and the last row is zero (paper fig. 2).

    Args:
        z_BLD: (B, L, ...), any trailing dims. Differentiable.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: fewer than 2 dims.
    """
    if z_BLD.ndim < 2:
        raise ValueError(f"shift_left: found shape {tuple(z_BLD.shape)}, expected (B, L, ...)")
    return torch.cat([z_BLD[:, 1:], torch.zeros_like(z_BLD[:, :1])], dim=1)


def pair_mask(
    positions_BL: Tensor, labels_BL: Tensor | None = None, *, shift: int = 1, ignore_index: int = -100
) -> Tensor:
    """Return the positions that count in the NITP loss.

    With ``shift`` 1 (paper eq. 3) a position counts when its successor is of the same document and its label is
    not ignored; with ``shift`` 0 (the same-position ablation; also "generic_cosine") when its label is not ignored.

    Args:
        positions_BL: integers, (B, L); they restart at every document.
        labels_BL: (B, L), or None where every label is valid.

    Returns:
        (B, L) bool.

    Raises:
        ValueError: another shift, positions that are no 2-D integer tensor, labels of another shape.
    """
    _check_positions(positions_BL)
    if shift not in (0, 1):
        raise ValueError(f"shift: found {shift}, expected 0 (same position) or 1 (next token)")
    if shift == 1:
        mask_BL = next_token_mask(positions_BL)
    else:
        mask_BL = torch.ones_like(positions_BL, dtype=torch.bool)
    if labels_BL is None:
        return mask_BL
    if labels_BL.shape != positions_BL.shape:
        raise ValueError(f"labels: found shape {tuple(labels_BL.shape)}, expected {tuple(positions_BL.shape)}")
    return mask_BL & (labels_BL != ignore_index)


def nitp_loss(
    prediction: Tensor,
    target: Tensor | None,
    mask: Tensor,
    *,
    kind: LossKind = "cosine",
    stop_gradient: bool = True,
) -> Tensor:
    """Sum a distance of predictions and implicit tokens over the True positions of ``mask`` (paper eq. 3, section 4).

    Per position, over the features:
        cosine: ``1 - cos``, where a zero vector has cosine 0
        mse, smooth_l1 (beta 1): the mean over features
        kl: ``KL(softmax(target) || softmax(prediction))``
        generic_cosine: the mean cosine of the prediction with every other True position of its sequence

    A False position has no influence on value or gradients, even where it holds NaN or inf. The caller divides
    the sum by the global count of pairs.

    Args:
        prediction: (..., D); (..., L, D) for "generic_cosine", whose sequences are the rows of the leading dims.
        target: (..., D), already shifted, or anything for "generic_cosine", which ignores it.
        mask: (...) bool.
        stop_gradient: whether the target is a constant of the backward pass (sg in paper eq. 2).

    Returns:
        0-d; float64 where an input is float64, else float32.

    Raises:
        ValueError: an unknown kind, a missing target, a mask that is not bool, shapes that do not match.
    """
    if kind not in LOSS_KINDS:
        nearest = difflib.get_close_matches(str(kind), LOSS_KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"kind: found {kind!r}, expected one of {', '.join(LOSS_KINDS)}; nearest: {nearest!r}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: found {mask.dtype}, expected torch.bool")
    if prediction.ndim < 1 or prediction.shape[:-1] != mask.shape:
        raise ValueError(
            f"mask: found shape {tuple(mask.shape)}, expected the leading dims of the prediction's"
            f" {tuple(prediction.shape)}"
        )
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    if kind == REGULARISER:
        if prediction.ndim < 2:
            raise ValueError(f"prediction: found shape {tuple(prediction.shape)}, expected (..., L, D)")
        return _generic_cosine(_select(prediction, mask).to(dtype), mask)

    if target is None:
        raise ValueError(f"target: found None, expected a tensor of shape {tuple(prediction.shape)} for kind {kind!r}")
    if target.shape != prediction.shape:
        raise ValueError(f"target: found shape {tuple(target.shape)}, expected {tuple(prediction.shape)}")
    if stop_gradient:
        target = target.detach()
    dtype = torch.promote_types(dtype, target.dtype)
    prediction, target = _select(prediction, mask).to(dtype), _select(target, mask).to(dtype)
    return torch.where(mask, DISTANCES[kind](prediction, target), 0).sum()


def scaled_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale every row by its largest magnitude, so that its norm neither overflows nor underflows.

    The cosine does not change with the scale, so the scale is a constant of the backward pass and derivatives of
    every order stay exact. A zero row (no magnitude reaches the dtype's smallest normal number, below which 1 / r
    overflows) becomes a zero row of norm 1 without a gradient: no epsilon, which would bias ordinary rows and
    send gradients of 1 / eps to zero ones.

    Args:
        x: (..., D), floating.

    Returns:
        Rows (..., D) and their norms (...): ``rows / norms[..., None]`` are the unit vectors. Not finite in, NaN out.
    """
    scale = x.detach().abs().amax(-1, keepdim=True)
    zero = scale < torch.finfo(x.dtype).tiny
    rows = x / torch.where(zero, torch.inf, scale)
    return rows, torch.where(zero.squeeze(-1), 1, torch.linalg.vector_norm(rows, dim=-1))


def _cosine(prediction: Tensor, target: Tensor) -> Tensor:
    (p, p_norm), (t, t_norm) = scaled_rows(prediction), scaled_rows(target)
    return 1 - (p * t).sum(-1) / (p_norm * t_norm)


def _mse(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction, target, reduction="none").mean(-1)


def _smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(prediction, target, reduction="none").mean(-1)


def _kl(prediction: Tensor, target: Tensor) -> Tensor:
    log_p, log_t = prediction.log_softmax(-1), target.log_softmax(-1)
    return F.kl_div(log_p, log_t, reduction="none", log_target=True).sum(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine,
    "mse": _mse,
    "smooth_l1": _smooth_l1,
    "kl": _kl,
}
"""Kind of loss -> the distance of predictions and targets (..., D) for each row (...), in fp32 or float64."""

if DISTANCES.keys() != LOSS_KINDS.keys() - {REGULARISER}:
    raise RuntimeError(f"DISTANCES has {', '.join(DISTANCES)}, expected those of config.LOSS_KINDS")


def _generic_cosine(h_LD: Tensor, mask_L: Tensor) -> Tensor:
    """Sum over positions of the mean cosine with the sequence's other positions; masked rows are zero already.

    Closed form, O(L D): the cosines of all ordered pairs of different rows sum to |sum u|^2 - sum |u|^2.
    """
    rows_LD, norms_L = scaled_rows(h_LD)
    u_LD = rows_LD / norms_L.unsqueeze(-1)
    pairs = u_LD.sum(-2).square().sum(-1) - u_LD.square().sum((-2, -1))
    count = mask_L.sum(-1)
    return torch.where(count > 1, pairs / (count - 1).clamp(min=1), 0).sum()


def _select(x: Tensor, mask: Tensor) -> Tensor:
    # where, not a product and not a selection of the result: 0 * NaN is NaN, in the gradient too.
    return torch.where(mask.unsqueeze(-1), x, 0)


def _check_positions(positions_BL: Tensor) -> None:
    dtype = positions_BL.dtype
    if positions_BL.ndim != 2 or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(f"positions: found {dtype} of shape {tuple(positions_BL.shape)}, expected integers (B, L)")
