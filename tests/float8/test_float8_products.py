"""The three products of each recipe's linear against a simulation of our own."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torchtitan.components.quantization import Float8Linear, Float8LinearConverter
from torchtitan.models.common.linear import Linear

from nitp_titan.float8 import converter as converter_module
from nitp_titan.float8.config import AUTO_FILTER, Float8Config
from nitp_titan.float8.converter import Float8Converter

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Products(NamedTuple):
    output: torch.Tensor
    input_grad: torch.Tensor
    weight_grad: torch.Tensor


def rounded(x: torch.Tensor, dtype: torch.dtype, dim: int | None) -> torch.Tensor:
    """Round to float8 and back in float64: one scale, or a power of two for each slice along ``dim``."""
    x = x.double()
    largest = torch.finfo(dtype).max
    amax = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = largest / amax
    if dim is not None:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (x * scale).clamp(-largest, largest).to(torch.float32).to(dtype).double() / scale


def simulated(recipe: str, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> Products:
    """x (M, K), w (N, K), g = gradient of the output (M, N); torchao/float8/config.py has the recipes in words."""
    if recipe == "tensorwise":
        x8, w8, g8 = rounded(x, E4M3, None), rounded(w, E4M3, None), rounded(g, E5M2, None)
        return Products(x8 @ w8.T, g8 @ w8, g8.T @ x8)
    output = rounded(x, E4M3, 1) @ rounded(w, E4M3, 1).T
    if recipe == "rowwise":
        return Products(output, rounded(g, E4M3, 1) @ rounded(w, E4M3, 0), rounded(g, E4M3, 0).T @ rounded(x, E4M3, 0))
    # The weight's one scale is rounded to a power of two here, too.
    amax = w.double().abs().max()
    scale = torch.exp2(torch.floor(torch.log2(448 / amax)))
    w8 = (w.double() * scale).float().to(E4M3).double() / scale
    return Products(output, rounded(g, E4M3, 1) @ w8, g.double().T @ x.double())


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Rows and columns of very different size, where recipes differ most."""
    torch.manual_seed(1)
    x, w, g = torch.randn(32, 48), torch.randn(64, 48), torch.randn(32, 64)
    for tensor in (x, w, g):
        tensor *= torch.logspace(-3, 3, tensor.shape[0]).unsqueeze(1)
        tensor *= torch.logspace(3, -3, tensor.shape[1])
    return tuple(tensor.to(dtype) for tensor in (x, w, g))


def multiplied(recipe: str, x, w, g, *, emulate: bool = True) -> Products:
    """The three products of the linear that the converter makes."""
    config = Linear.Config(in_features=48, out_features=64)
    model = ModelOf(config)
    Float8Converter.Config(float8=Float8Config(recipe=recipe, emulate=emulate), tokens=32).build().convert(model)
    linear = model.layer.build().to(x.dtype)
    assert isinstance(linear, Float8Linear)
    with torch.no_grad():
        linear.weight.copy_(w)
    x = x.clone().requires_grad_()
    output = linear(x)
    output.backward(g)
    return Products(output.detach(), x.grad, linear.weight.grad)


class ModelOf:
    """The least that a converter can traverse."""

    def __init__(self, layer: Linear.Config):
        self.layer = layer

    def traverse(self, cls: type):
        return [("layer", self.layer, self, "layer")] if isinstance(self.layer, cls) else []


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of any row or column."""
    error, size = (found.double() - expected).square(), expected.square()
    # A slice of zeros that is one has no error.
    return max((error.sum(dim) / size.sum(dim)).nan_to_num(0).max() for dim in (0, 1)).sqrt().item()


@pytest.mark.parametrize("recipe", RECIPES)
def test_emulated_products_are_those_of_the_recipe(recipe):
    found = multiplied(recipe, *operands())
    for name in Products._fields:
        for other in RECIPES:
            expected = getattr(simulated(other, *operands()), name)
            if other == recipe:
                assert distance(getattr(found, name), expected) < 1e-5, name
            elif (name, {other, recipe}) != ("output", {"rowwise", "rowwise_with_gw_hp"}):
                assert distance(getattr(found, name), expected) > 1e-2, (name, other)


def test_the_weights_gradient_in_high_precision_is_the_plain_one():
    x, w, g = operands()
    exact = g.double().T @ x.double()
    assert distance(multiplied("rowwise_with_gw_hp", x, w, g).weight_grad, exact) < 1e-5
    assert distance(multiplied("rowwise", x, w, g).weight_grad, exact) > 1e-3


@pytest.mark.usefixtures("cpu_products")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch's rowwise product on a CPU is newer")
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_of_torchs_float8_operator_are_the_emulated_ones(recipe, monkeypatch):
    monkeypatch.setattr(converter_module, "has_cuda_capability", lambda major, minor: True)
    values = operands(torch.bfloat16)
    for found, expected in zip(multiplied(recipe, *values, emulate=False), multiplied(recipe, *values), strict=True):
        assert distance(found, expected.double()) < 2**-8


def test_upstreams_converter_forgets_the_recipe_that_it_emulates():
    """Why there is one here: the day it does not, this fails."""
    linears = [Linear.Config(in_features=48, out_features=64) for _ in range(2)]
    model = ModelOf(linears[0])
    Float8LinearConverter.Config(recipe_name="rowwise", emulate=True).build().convert(model)
    assert model.layer._torchao_config.cast_config_input.scaling_granularity.value == "tensorwise"
    # And its automatic filter takes a configuration for a module: it converts nothing.
    large = ModelOf(Linear.Config(in_features=8192, out_features=8192))
    Float8LinearConverter.Config(filter_fqns=[AUTO_FILTER], emulate=True).build().convert(large)
    assert type(large.layer) is Linear.Config
