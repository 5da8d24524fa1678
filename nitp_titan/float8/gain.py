"""When a float8 linear is faster than a bf16 one, by torchao's measurements and torchao's roofline on an H100.

Two sources, both of torchao 0.18:

- *thresholds* on the weight's shape: ``_auto_filter_for_recipe`` (torchao/float8/float8_linear_utils.py), drawn there
  from the benchmark tables of its documentation. It has none for "rowwise_with_gw_hp", whose two float8 products are
  the rowwise ones: rowwise's stand in.
- *roofline*: torchao/testing/training/roofline_utils.py, the column of those tables that is calculated. It also knows
  the number of tokens, and is an upper bound: kernels do not reach it.

Plain arithmetic, free of torch.
"""

# M = tokens of a rank, K = input features, N = output features, all as one rank multiplies them; G = groups of tokens,
# each with a weight of its own (1 = a linear layer)

from __future__ import annotations

_BF16_FLOPS = 989e12 * 0.78
_FLOAT8_FLOPS = 1979e12 * 0.78
_BYTES_PER_SECOND = 2.4e12 * 0.92
_LAUNCH = 2e-6
"""Peaks of torchao's H100, its share of them that kernels reach, and seconds that the smallest kernel takes."""


def times(recipe: str, m: int, k: int, n: int, groups: int = 1) -> tuple[float, float]:
    """Return the seconds of a linear's forward and backward in (bf16, float8) by torchao's roofline.

    Args:
        recipe: "tensorwise", "rowwise" or "rowwise_with_gw_hp".
        m: tokens, of all groups.
        k: input features.
        n: output features.
        groups: of a grouped product. torchao's roofline has none: theirs moves as many weights, and is one kernel.
    """
    weight, x, y = groups * k * n, m * k, m * n
    products = ((x, weight, y), (y, weight, x), (x, y, weight))  # output, input's gradient, weight's gradient
    bf16 = [_product(m * k * n, *sizes, element=2, flops=_BF16_FLOPS) for sizes in products]
    float8 = [_product(m * k * n, *sizes, element=1, flops=_FLOAT8_FLOPS) for sizes in products]
    if recipe == "rowwise_with_gw_hp":
        float8[2] = bf16[2]
    return sum(bf16), sum(float8) + _casts(recipe, x, weight, y)


def _product(multiplications: int, left: int, right: int, result: int, *, element: int, flops: float) -> float:
    """Seconds of a product of operands of ``element`` bytes; the result is bf16."""
    moved = element * (left + right) + 2 * result
    return max(2 * multiplications / flops, moved / _BYTES_PER_SECOND, _LAUNCH)


def _casts(recipe: str, x: int, weight_size: int, y: int) -> float:
    """Seconds of finding scales and casting; the read of an activation is fused with what made it."""
    # Bytes that each kernel moves for an element of an activation and of the weight (bf16 is 2, float8 is 1).
    activation, weight = {
        "tensorwise": ((0, 0, 4), (2, 0, 3, 3)),
        "rowwise": ((3, 3), (3, 4, 3)),
        "rowwise_with_gw_hp": ((1,), (3, 0, 3)),
    }[recipe]
    moved = [*(b * x for b in activation), *(b * weight_size for b in weight), *(b * y for b in activation)]
    return sum(max(size / _BYTES_PER_SECOND, _LAUNCH) for size in moved)


def why_no_gain(recipe: str, m: int, k: int, n: int, groups: int = 1) -> str:
    """Return why float8 is expected not to be faster than bf16, or "" where it is expected to be; see :func:`times`."""
    below = _below_threshold(recipe, k, n)
    if below:
        return f"too small by torchao's measurements ({below})"
    bf16, float8 = times(recipe, m, k, n, groups)
    return "" if bf16 > float8 else f"no gain by torchao's roofline ({bf16 / float8:.2f}x)"


def _below_threshold(recipe: str, k: int, n: int) -> str:
    if recipe == "tensorwise":
        return "K <= 4096 and N <= 1024" if k <= 4096 and n <= 1024 else ""
    if n <= 2048:
        return "N <= 2048"
    if k <= 1024:
        return "K <= 1024"
    return "K <= 2048 and N <= 4096" if k <= 2048 and n <= 4096 else ""
