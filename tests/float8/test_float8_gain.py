"""When float8 pays is what torchao says, in plain arithmetic."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torchao.float8 import _auto_filter_for_recipe

from nitp_titan.float8.gain import times, why_no_gain

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


@functools.cache
def torchao_roofline(recipe: str):
    """torchao's own function of (M, K, N): seconds in bf16 and in float8."""
    import sympy
    from torchao.testing.training.roofline_utils import get_float8_mem_sympy, get_gemm_time_sympy

    m, k, n = sympy.symbols("m k n")
    gpu = "NVIDIA H100"
    bf16 = get_gemm_time_sympy(m, k, n, torch.bfloat16, None, None, gpu)
    products = get_gemm_time_sympy(m, k, n, torch.float8_e4m3fn, recipe, None, gpu)
    casts = get_float8_mem_sympy(m, k, n, recipe, None, True, gpu)
    return sympy.lambdify((m, k, n), (bf16, products + casts))


@pytest.mark.parametrize("recipe", RECIPES)
def test_times_are_those_of_torchaos_roofline(recipe):
    for m, k, n in itertools.product((16, 1024, 65536), (16, 512, 896, 4096), (64, 4864, 16384)):
        expected = [float(seconds) for seconds in torchao_roofline(recipe)(m, k, n)]
        assert times(recipe, m, k, n) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("recipe", RECIPES)
def test_thresholds_are_those_of_torchaos_automatic_filter(recipe):
    # torchao has none for the third recipe, whose float8 products are rowwise's.
    keep = _auto_filter_for_recipe("rowwise" if recipe == "rowwise_with_gw_hp" else recipe, filter_fqns=[])
    sizes = sorted({edge + step for edge in (512, 1024, 2048, 4096, 8192) for step in (-16, 0, 16)})
    for k, n in itertools.product(sizes, sizes):
        with torch.device("meta"):
            wanted = keep(torch.nn.Linear(k, n), "layer")
        assert ("torchao's measurements" in why_no_gain(recipe, 2**20, k, n)) is not wanted, (k, n)


def test_few_tokens_gain_nothing_and_many_do():
    assert why_no_gain("tensorwise", 512, 4096, 4096).startswith("no gain by torchao's roofline (0.")
    assert why_no_gain("tensorwise", 16384, 4096, 4096) == ""


def test_tensorwise_gains_where_rowwise_does_not():
    # The feed-forward of the paper's 0.5B model at 65,536 tokens.
    assert why_no_gain("tensorwise", 65536, 896, 4864) == ""
    assert "K <= 1024" in why_no_gain("rowwise", 65536, 896, 4864)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_grouped_product_takes_one_kernel_and_the_weights_of_all_groups(recipe):
    m, k, n, groups = 2**20, 5120, 8192, 16
    together, alone = times(recipe, m, k, n, groups), times(recipe, m // groups, k, n)
    # Of so many tokens a group that nothing is as short as a kernel's least time, groups are as good as apart.
    assert together == pytest.approx([groups * seconds for seconds in alone], rel=1e-3)
    few = times(recipe, 16 * groups, 64, 64, groups)
    assert max(few) < groups * min(times(recipe, 16, 64, 64))
    assert times(recipe, m, k, n, 1) == times(recipe, m, k, n)
