"""TorchTitan's float8 conversion of a model's configuration, with the recipe and the filter that were asked for.

TorchTitan 0.3's ``Float8LinearConverter`` knows no tensorwise recipe, forgets the recipe where it emulates, converts
nothing where its automatic filter is on, and takes linears with a product of their own for plain ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchtitan.components.quantization import Float8Linear, QuantizationConverter
from torchtitan.components.quantization.utils import swap_token_dispatcher
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import has_cuda_capability, has_rocm_capability

from nitp_titan.float8.config import Float8Config
from nitp_titan.float8.layers import (
    MULTIPLE,
    LinearLayer,
    RoutedExperts,
    experts_problem,
    unmatched,
)
from nitp_titan.float8.plan import Plan, plan
from nitp_titan.nitp.config import PROJECTOR_PREFIX
from nitp_titan.titan.retyped import retyped


class Float8Converter(QuantizationConverter):
    """Replaces the linears of a model's configuration, and where asked its routed experts, by float8 ones.

    A ``ModelConfigConverter`` as TorchTitan's ``model_registry`` takes them. Parameters keep names, dtype and initial
    values; between ranks they travel in high precision.

    Raises:
        ValueError: the device has no float8 products and ``emulate`` is off, a word of ``filter_fqns`` is in no name,
            or there are no experts to convert; the message names the key.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(QuantizationConverter.Config):
        float8: Float8Config
        tokens: int
        """A rank's at a time."""
        tensor_parallel: int = 1
        expert_parallel: int = 1

    def __init__(self, config: Config):
        self.config = config
        float8 = config.float8
        if float8.recipe == "none":
            raise ValueError('float8.recipe: found "none", expected a recipe')
        if not (float8.emulate or has_cuda_capability(8, 9) or has_rocm_capability(9, 4)):
            raise ValueError(
                f'float8.recipe: found "{float8.recipe}" on a device without float8 products, expected a GPU of '
                "compute capability 8.9, or float8.emulate = true, which is slower"
            )
        if float8.experts and not float8.emulate and not _has_grouped_products():
            raise ValueError(
                "float8.experts: found true, expected a GPU of compute capability 9.0 or 10.0, or float8.emulate = true"
            )

    def plan(self, model_config: Any) -> Plan:
        """Return what :meth:`convert` would do."""
        config = self.config
        layers = [
            LinearLayer(
                name=name,
                in_features=linear.in_features,
                out_features=linear.out_features,
                special=type(linear) is not Linear.Config,
                at_most=model_config.projector_tokens if name.startswith(PROJECTOR_PREFIX) else None,
            )
            for name, linear, _, _ in model_config.traverse(Linear.Config)
        ]
        experts = [
            RoutedExperts(
                name=name.removesuffix(f".{attribute}"),
                dim=experts.dim,
                hidden_dim=experts.hidden_dim,
                num_experts=experts.num_experts,
                top_k=parent.token_dispatcher.top_k,
            )
            for name, experts, parent, attribute in model_config.traverse(GroupedExperts.Config)
        ]
        if problems := list(_problems(config.float8, layers, experts, config.tokens)):
            raise ValueError("; ".join(problems))
        return plan(
            config.float8,
            layers,
            tokens=config.tokens,
            experts=experts,
            tensor_parallel=config.tensor_parallel,
            expert_parallel=config.expert_parallel,
        )

    def convert(self, model_config: Any) -> Any:
        """Convert a configuration in place and return it; the log says what was converted and what was left."""
        float8, made = self.config.float8, self.plan(model_config)
        converted = {choice.layer.name for choice in made.converted}
        recipe = _torchao_recipe(float8)
        for name, linear, parent, attribute in model_config.traverse(Linear.Config):
            if name in converted:
                _put(parent, attribute, retyped(linear, Float8Linear.Config, _torchao_config=recipe))
        if float8.experts:
            # Imported here: a prototype of torchao's, with Triton kernels.
            from nitp_titan.float8.experts import float8_experts_config

            for _, experts, parent, attribute in model_config.traverse(GroupedExperts.Config):
                if not float8.emulate:
                    # The kernels want each expert's rows padded to a multiple; what emulates them takes any number.
                    swap_token_dispatcher(parent, MULTIPLE)
                _put(parent, attribute, float8_experts_config(experts, emulate=float8.emulate))
        _tell(made, compiled=self.config.model_compile_enabled)
        return model_config


def _has_grouped_products() -> bool:
    """Whether this device has torch's ``_scaled_grouped_mm``: compute capability 9.x or 10.x, neither 8.9 nor 12."""
    if has_rocm_capability(9, 4):
        return True
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


def _problems(
    config: Float8Config, layers: list[LinearLayer], experts: list[RoutedExperts], tokens: int
) -> Iterator[str]:
    for word, near in unmatched(config, layers):
        hint = f'; did you mean "{near}"?' if near else ""
        yield f'float8.filter_fqns: found "{word}", which is in no linear layer\'s name{hint}'
    if config.experts and not experts:
        yield "float8.experts: found true, expected false: the model has no routed experts"
    if config.experts and (problem := next(filter(None, (experts_problem(e.dim, e.hidden_dim) for e in experts)), "")):
        yield f"float8.experts: found true, expected false: {problem}"
    if tokens % MULTIPLE and not config.emulate:
        yield f"float8.recipe: a rank has {tokens} tokens at a time, expected a multiple of {MULTIPLE}"


def _torchao_recipe(config: Float8Config) -> Float8LinearConfig:
    recipe = Float8LinearConfig.from_recipe_name(config.recipe)
    if config.recipe.startswith("rowwise"):
        # As TorchTitan does: a norm that is recomputed for the backward pass must round as in the forward pass
        # (https://github.com/pytorch/pytorch/issues/150859).
        torch._inductor.config.emulate_precision_casts = True
    # Of nothing: for torchao's workaround of a Triton miscompilation of float8 stores, which comes along with it
    # (https://github.com/triton-lang/triton/issues/11111).
    convert_to_float8_training(torch.nn.Module())
    return dataclasses.replace(recipe, emulate=config.emulate)


def _put(parent: Any, attribute: Any, config: Any) -> None:
    if isinstance(parent, list):
        parent[attribute] = config
    else:
        setattr(parent, attribute, config)


def _tell(made: Plan, *, compiled: bool) -> None:
    logger.info(f"float8 {made.summary()}")
    for line in made.lines():
        logger.info(f"float8 {line}")
    for warning in made.warnings(compiled=compiled, gpu=torch.cuda.is_available()):
        logger.warning(warning)
